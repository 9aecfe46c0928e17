"""The ClientApp: a message comes in, one reply of a fixed form goes out, and the audit log knows it first."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedsigma.client.site.audit_log import AuditLog
from fedsigma.client.site.error_feedback import ErrorFeedback
from fedsigma.client.site.secure_aggregation import SITE_COUNTS, SecureAggregationClient, make_counts
from fedsigma.client.site.site import Site, SiteCountDiffers, open_site
from fedsigma.common import __version__
from fedsigma.common.privacy.accounting import PrivacyEvent, sampling_rate
from fedsigma.common.privacy.noise import shared_noise
from fedsigma.common.training.trainer import EvalOutput, Trainer, TrainOutput, derive_seed
from fedsigma.common.utils.hash_chain import LogTampered
from fedsigma.common.wire import records
from fedsigma.common.wire.codec import decode, encode, encode_update
from fedsigma.common.wire.records import (
    EvaluateReply,
    EvaluateTask,
    Evaluation,
    HandshakeReply,
    HandshakeRequest,
    MaskedReply,
    TrainReply,
    TrainTask,
)

if TYPE_CHECKING:
    from fedsigma.common.data.loading import SiteData

__all__ = ["app"]

app = ClientApp()
log = logging.getLogger("fedsigma.client")

SITE_ERROR = 100
"""Code of the error reply of a site whose handler failed; its reason is the exception's type, no more."""

Vector = NDArray[np.float32]
Task = TypeVar("Task", HandshakeRequest, TrainTask, EvaluateTask)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this site is and what it computes with."""
    return _answer(message, context, HandshakeRequest, partial(_hello, context=context))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate the incoming shift and train it on this site's images."""
    return _answer(message, context, TrainTask, partial(_train, context=context))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate one or more shifts on this site's test images."""
    return _answer(message, context, EvaluateTask, _evaluate)


def _answer(
    message: Message, context: Context, kind: type[Task], handler: Callable[[Site, Task], Any]
) -> Message:
    """Read the task, handle it, and write down what leaves before it leaves.

    Whatever fails, the server learns the exception's type alone: its text may hold paths, file names and
    patients' identifiers, so it stays in the site's own log.
    """
    site: Site | None = None
    asked: dict[str, Any] = {"message": kind.__name__, "run": str(context.run_id)}
    try:
        _use_one_thread_per_cpu(context)
        task = records.from_record(kind, message.content)
        asked |= {"study": task.study.name, "round": getattr(task, "round", 0)}
        asked |= {"mode": task.mode} if isinstance(task, TrainTask) else {}
        try:
            site = open_site(context.node_config, task.study, run=f"run-{context.run_id}")
        except SiteCountDiffers as error:
            # Only a simulation gets here, before it is known which site this is.
            name = f"partition {context.node_config['partition-id']}"
            reply = _no_part(name, "site-count", sites=error.sites)
            return Message(records.to_record(reply), reply_to=message)
        content = records.to_record(handler(site, task))
        AuditLog(site.audit_path).record(asked, records.fields_of(content))
        return Message(content, reply_to=message)
    except Exception as error:
        told = type(error).__name__ if site is None else _recorded(site, asked, error)
        log.exception("the task failed; the server is told %s", told)
        return Message(Error(SITE_ERROR, told), reply_to=message)


def _recorded(site: Site, asked: dict[str, Any], error: Exception) -> str:
    """Write down the type that the server is to be told; what cannot be written down is not told."""
    try:
        AuditLog(site.audit_path).record(asked, {"error": type(error).__name__})
    except (OSError, LogTampered) as failure:
        log.exception("the audit log at %s cannot be written", site.audit_path)
        return type(failure).__name__
    return type(error).__name__


def _hello(site: Site, task: HandshakeRequest, *, context: Context) -> HandshakeReply:
    from fedsigma.common.sigma import Fingerprint

    site.check_study(task.study)
    if task.protocol != records.PROTOCOL:
        log.error("the server speaks protocol %s, this site %s", task.protocol, records.PROTOCOL)
        return _no_part(site.name, "protocol", sites=site.sites)
    mine = site.trainer(task.study).fingerprint
    # The server compares, too, and decides; this is how the site's own people learn why.
    difference = Fingerprint.from_json(task.fingerprint).describe_mismatch(mine)
    if difference:
        log.error("this site takes no part in study '%s': %s", task.study.name, difference)
    member = None
    if site.has_identity:
        masker = SecureAggregationClient(site, task.study.name, run=context.run_id)
        with masker.locked():
            member = masker.member()
    return HandshakeReply(
        protocol=records.PROTOCOL,
        site=site.name,
        fingerprint=mine.to_json(),
        version=__version__,
        sites=site.sites,
        problem="fingerprint" if difference else "",
        allow_attribution=site.policy.allow_attribution,
        allow_explanation=site.policy.allow_explanation,
        mask_key=member.key if member else b"",
        mask_signature=member.signature if member else b"",
    )


def _no_part(name: str, problem: str, *, sites: int) -> HandshakeReply:
    return HandshakeReply(
        protocol=records.PROTOCOL,
        site=name,
        fingerprint="",
        version=__version__,
        sites=sites,
        problem=problem,
    )


def _train(site: Site, task: TrainTask, *, context: Context) -> TrainReply | MaskedReply:
    site.check_task(task)
    if task.members:
        masker = SecureAggregationClient(site, task.study.name, run=context.run_id)
        with masker.locked():  # from what was answered before to the answer
            return _train_masked(site, task, masker, context)
    learner = site.trainer(task.study)
    images = site.images(task.study, side=learner.image_side)
    _spend_of_site(site, task, context)
    epsilon = _spend(site, task, images, context)
    before, learned, change = _work(site, task, learner, images)
    return TrainReply(
        update=_encode_update(site, task, learner, change, ErrorFeedback(context.state)),
        examples=learned.examples,
        steps=learned.steps,
        loss=learned.loss,
        evaluation=before,
        epsilon=epsilon,
        class_counts=_class_counts(site, task, images.train),
    )


def _train_masked(
    site: Site, task: TrainTask, masker: SecureAggregationClient, context: Context
) -> MaskedReply:
    """As `_train`, with a reply of which the server can read the cohort's sum only."""
    masker.check_task(task)
    if (answered := masker.find_reply(task)) is not None:
        return answered
    _spend_of_site(site, task, context)  # each cohort that is answered gets noise of its own, so each counts
    if (known := masker.find_update()) is None:
        learner = site.trainer(task.study)
        images = site.images(task.study, side=learner.image_side)
        _spend(site, task, images, context)
        before, learned, change = _work(site, task, learner, images)
        counts = make_counts(
            examples=min(learned.examples, task.most_examples),
            loss=learned.loss,
            test_examples=before.test_examples,
            accuracy=before.accuracy,
        )
        masker.store_update(change, counts)
        known = change, counts
    if task.privacy.of_sites:
        known = shared_noise(known[0], task.privacy, sites=len(task.members)), SITE_COUNTS
    return masker.make_reply(task, *known)


def _spend_of_site(site: Site, task: TrainTask, context: Context) -> None:
    """Where whole sites are hidden, enter an answer into the ledger, whoever adds the noise."""
    if task.privacy.of_sites:
        release = PrivacyEvent(rate=1.0, noise_multiplier=task.privacy.noise_multiplier, steps=1)
        site.charge_privacy(task, release, run=str(context.run_id))


def _spend(site: Site, task: TrainTask, images: SiteData, context: Context) -> float:
    """Have private training entered into the site's ledger before it starts: what has been spent so far."""
    if not task.privacy.in_training:
        return 0.0
    release = PrivacyEvent(
        rate=sampling_rate(len(images.train), task.recipe.batch_size),
        noise_multiplier=task.privacy.noise_multiplier,
        steps=task.steps,
    )
    return site.charge_privacy(task, release, run=str(context.run_id))


def _work(
    site: Site, task: TrainTask, learner: Trainer, images: SiteData
) -> tuple[Evaluation, TrainOutput, Vector]:
    """Judge the incoming shift and train it: the evaluation, what training gave, and the change.

    Where some of the shift is personal, the site's own values are judged and trained with the shared ones,
    and stay: the change is that of the shared ones.
    """
    split = learner.partition(task.study.personal)
    personal = site.personal_state(task.study, learner, run=task.run)
    own = personal.initial(task.round if task.mode == "round" else 1)
    shift = split.combine(decode(task.shift, split.shared), own)
    test = images.test if task.evaluate else []
    if test:
        site.charge_evaluation(task.study, 1)
    before = _told(_judge(learner, shift, test), test)
    learned = learner.train(
        shift,
        images.train,
        task.recipe,
        first_step=task.first_step,
        steps=task.steps,
        total_steps=task.total_steps,
        seed=derive_seed(task.study.seed, site.name, task.mode, task.round),
        privacy=task.privacy,
    )
    if split.personal_size and task.mode == "round":
        personal.store(own, split.personal_values(learned.shift), round=task.round)
    return before, learned, split.shared_values(learned.shift - shift)


def _encode_update(
    site: Site, task: TrainTask, trainer: Trainer, update: Vector, feedback: ErrorFeedback
) -> bytes:
    """Code an update of a round with what coding lost of the last one, and store what it loses now."""
    layout = trainer.partition(task.study.personal).shared
    seed = derive_seed(task.study.seed, site.name, task.mode, task.round, "codec")
    if task.mode != "round":
        return encode(update, layout, level=task.codec, seed=seed)
    residual = feedback.residual(layout, before=task.round)
    data, residual = encode_update(update, residual, layout, level=task.codec, seed=seed)
    feedback.store(residual, layout, round=task.round)
    return data


def _class_counts(site: Site, task: TrainTask, examples: list[Any]) -> tuple[int, ...]:
    if not site.policy.share_class_counts or task.privacy.in_training:
        return ()
    labels = [example.label for example in examples]
    return tuple(labels.count(index) for index in range(len(task.study.classes)))


def _evaluate(site: Site, task: EvaluateTask) -> EvaluateReply:
    site.check_study(task.study)
    learner = site.trainer(task.study)
    images = site.images(task.study, side=learner.image_side)
    split = learner.partition(task.study.personal)
    own = site.personal_state(task.study, learner, run=task.run).current() if task.personal else None
    shifts = [split.combine(decode(data, split.shared), own) for data in task.shifts]
    if images.test:
        site.charge_evaluation(task.study, len(shifts))
    judged = [_judge(learner, shift, images.test) for shift in shifts]
    counts = tuple(count for one in judged for count in one.confusion)
    return EvaluateReply(
        evaluations=tuple(_told(one, images.test) for one in judged),
        confusions=counts if site.policy.share_confusion else (),
    )


def _judge(learner: Trainer, shift: Vector, examples: list[Any]) -> EvalOutput:
    """Evaluate a shift; without test images, nothing is known."""
    return learner.evaluate(shift, examples) if examples else EvalOutput(metrics={}, confusion=())


def _told(judged: EvalOutput, examples: list[Any]) -> Evaluation:
    return Evaluation.of(judged.metrics, len(examples))


def _use_one_thread_per_cpu(context: Context) -> None:
    """In a simulation, use as many threads as the actor has processors: Ray tells by this variable."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if "partition-id" in context.node_config and threads.isdecimal() and int(threads) > 0:
        import torch

        if torch.get_num_threads() != int(threads):
            torch.set_num_threads(int(threads))
