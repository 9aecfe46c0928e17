"""The ClientApp of a site: handles each message, and logs its reply to the audit log before it is sent."""

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

from fedsigma.client.site.audit_log import log_reply
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
"""Code of a site's error reply, whose reason is the exception's type only."""

Vector = NDArray[np.float32]
Task = TypeVar("Task", HandshakeRequest, TrainTask, EvaluateTask)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Return the site's name, version, fingerprint and mask key."""
    return _reply(message, context, HandshakeRequest, partial(_hello, context=context))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate the incoming shift and train it on this site's images."""
    return _reply(message, context, TrainTask, partial(_train, context=context))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate one or more shifts on this site's test images."""
    return _reply(message, context, EvaluateTask, _evaluate)


def _reply(
    message: Message, context: Context, kind: type[Task], handler: Callable[[Site, Task], Any]
) -> Message:
    """Parse a task, handle it, and log the reply.

    The server receives no more of an exception than its type: the text may contain paths, file names and
    patient identifiers, so it goes to the site's own log.
    """
    site: Site | None = None
    request: dict[str, Any] = {"message": kind.__name__, "run": str(context.run_id)}
    try:
        _use_one_thread_per_cpu(context)
        task = records.from_record(kind, message.content)
        request |= {"study": task.study.name, "round": getattr(task, "round", 0)}
        request |= {"mode": task.mode} if isinstance(task, TrainTask) else {}
        try:
            site = open_site(context.node_config, task.study, run=f"run-{context.run_id}")
        except SiteCountDiffers as error:  # in a simulation only, before the site's name is known
            name = f"partition {context.node_config['partition-id']}"
            refusal = _handshake_reply(name, sites=error.sites, problem="site-count")
            return Message(records.to_record(refusal), reply_to=message)
        content = records.to_record(handler(site, task))
        log_reply(site.audit_path, request, records.fields_of(content))
        return Message(content, reply_to=message)
    except Exception as error:
        reason = type(error).__name__
        if site is not None:
            try:
                log_reply(site.audit_path, request, {"error": reason})
            except (OSError, LogTampered) as failure:
                log.exception("the audit log at %s cannot be written", site.audit_path)
                reason = type(failure).__name__
        log.exception("the task failed; the server receives %s", reason)
        return Message(Error(SITE_ERROR, reason), reply_to=message)


def _hello(site: Site, task: HandshakeRequest, *, context: Context) -> HandshakeReply:
    from fedsigma.common.sigma import Fingerprint

    site.check_study(task.study)
    if task.protocol != records.PROTOCOL:
        log.error("the server uses protocol %s, this site %s", task.protocol, records.PROTOCOL)
        return _handshake_reply(site.name, sites=site.sites, problem="protocol")
    fingerprint = site.trainer(task.study).fingerprint
    # The server compares as well, and decides; this tells the site's own people the reason.
    mismatch = Fingerprint.from_json(task.fingerprint).describe_mismatch(fingerprint)
    if mismatch:
        log.error("this site cannot take part in study '%s': %s", task.study.name, mismatch)
    keys: dict[str, bytes] = {}
    if site.has_identity:
        masker = SecureAggregationClient(site, task.study.name, run=context.run_id)
        with masker.locked():
            member = masker.member()
        keys = {"mask_key": member.key, "mask_signature": member.signature}
    return _handshake_reply(
        site.name,
        fingerprint=fingerprint.to_json(),
        sites=site.sites,
        problem="fingerprint" if mismatch else "",
        allow_attribution=site.policy.allow_attribution,
        allow_explanation=site.policy.allow_explanation,
        **keys,
    )


def _handshake_reply(name: str, *, fingerprint: str = "", **values: Any) -> HandshakeReply:
    return HandshakeReply(
        protocol=records.PROTOCOL, site=name, version=__version__, fingerprint=fingerprint, **values
    )


def _train(site: Site, task: TrainTask, *, context: Context) -> TrainReply | MaskedReply:
    site.check_task(task)
    if task.members:
        masker = SecureAggregationClient(site, task.study.name, run=context.run_id)
        with masker.locked():  # until the reply is stored
            return _train_masked(site, task, masker, context)
    trainer = site.trainer(task.study)
    images = site.images(task.study, side=trainer.image_side)
    _charge_site_release(site, task, context)
    evaluation, output, update, epsilon = _compute_update(site, task, trainer, images, context)
    return TrainReply(
        update=_encode_update(site, task, trainer, update, ErrorFeedback(context.state)),
        examples=output.examples,
        steps=output.steps,
        loss=output.loss,
        evaluation=evaluation,
        epsilon=epsilon,
        class_counts=_class_counts(site, task, images.train),
    )


def _train_masked(
    site: Site, task: TrainTask, masker: SecureAggregationClient, context: Context
) -> MaskedReply:
    """Train as `_train` does; the server can read only the sum of the cohort's replies."""
    masker.check_task(task)
    if (reply := masker.find_reply(task)) is not None:
        return reply
    _charge_site_release(site, task, context)  # each cohort gets noise of its own, so each is charged
    if (trained := masker.find_update()) is None:
        trainer = site.trainer(task.study)
        images = site.images(task.study, side=trainer.image_side)
        evaluation, output, update, _ = _compute_update(site, task, trainer, images, context)
        counts = make_counts(
            examples=min(output.examples, task.most_examples),
            loss=output.loss,
            test_examples=evaluation.test_examples,
            accuracy=evaluation.accuracy,
        )
        masker.store_update(update, counts)
        trained = update, counts
    if task.privacy.of_sites:
        trained = shared_noise(trained[0], task.privacy, sites=len(task.members)), SITE_COUNTS
    return masker.make_reply(task, *trained)


def _charge_site_release(site: Site, task: TrainTask, context: Context) -> None:
    """With privacy of whole sites, enter the reply into the ledger, whichever side adds the noise."""
    if task.privacy.of_sites:
        event = PrivacyEvent(rate=1.0, noise_multiplier=task.privacy.noise_multiplier, steps=1)
        site.charge_privacy(task, event, run=str(context.run_id))


def _compute_update(
    site: Site, task: TrainTask, trainer: Trainer, images: SiteData, context: Context
) -> tuple[Evaluation, TrainOutput, Vector, float]:
    """Evaluate the incoming shift and train it.

    The site's personal values are combined with the shared ones for both, and stay at the site.

    Returns:
        The evaluation, the training's output, the update of the shared values, and with private training the
        epsilon spent so far.
    """
    epsilon = 0.0
    if task.privacy.in_training:
        event = PrivacyEvent(
            rate=sampling_rate(len(images.train), task.recipe.batch_size),
            noise_multiplier=task.privacy.noise_multiplier,
            steps=task.steps,
        )
        epsilon = site.charge_privacy(task, event, run=str(context.run_id))
    partition = trainer.partition(task.study.personal)
    state = site.personal_state(task.study, trainer, run=task.run)
    personal = state.initial(task.round if task.mode == "round" else 1)
    shift = partition.combine(decode(task.shift, partition.shared), personal)
    test = images.test if task.evaluate else []
    if test:
        site.charge_evaluation(task.study, 1)
    evaluation = Evaluation.of(_evaluate_shift(trainer, shift, test).metrics, len(test))
    output = trainer.train(
        shift,
        images.train,
        task.recipe,
        first_step=task.first_step,
        steps=task.steps,
        total_steps=task.total_steps,
        seed=derive_seed(task.study.seed, site.name, task.mode, task.round),
        privacy=task.privacy,
    )
    if partition.personal_size and task.mode == "round":
        state.store(personal, partition.personal_values(output.shift), round=task.round)
    return evaluation, output, partition.shared_values(output.shift - shift), epsilon


def _encode_update(
    site: Site, task: TrainTask, trainer: Trainer, update: Vector, feedback: ErrorFeedback
) -> bytes:
    """Encode an update; in a round, with the residual of the last one, and store the new residual."""
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
    trainer = site.trainer(task.study)
    test = site.images(task.study, side=trainer.image_side).test
    partition = trainer.partition(task.study.personal)
    personal = site.personal_state(task.study, trainer, run=task.run).current() if task.personal else None
    shifts = [partition.combine(decode(data, partition.shared), personal) for data in task.shifts]
    if test:
        site.charge_evaluation(task.study, len(shifts))
    outputs = [_evaluate_shift(trainer, shift, test) for shift in shifts]
    confusions = tuple(count for output in outputs for count in output.confusion)
    return EvaluateReply(
        evaluations=tuple(Evaluation.of(output.metrics, len(test)) for output in outputs),
        confusions=confusions if site.policy.share_confusion else (),
    )


def _evaluate_shift(trainer: Trainer, shift: Vector, examples: list[Any]) -> EvalOutput:
    return trainer.evaluate(shift, examples) if examples else EvalOutput(metrics={}, confusion=())


def _use_one_thread_per_cpu(context: Context) -> None:
    """In a simulation, use as many threads as the actor has processors, which Ray sets in this variable."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if "partition-id" in context.node_config and threads.isdecimal() and int(threads) > 0:
        import torch

        if torch.get_num_threads() != int(threads):
            torch.set_num_threads(int(threads))
