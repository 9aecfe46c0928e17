"""The rounds of a study.

`train` is the loop of FedAvg (McMahan et al. 2017, arXiv:1602.05629) and `run_round` one turn of it: sample
sites, send each the global shift, collect their updates, and let the aggregation rule make the next global
shift.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import MessageType
from numpy.typing import NDArray

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.privacy.noise import noisy_mean
from fedsigma.common.sigma import Fingerprint, ParameterPartition
from fedsigma.common.training.trainer import derive_seed
from fedsigma.common.utils.errors import FAILED, FedSigmaError
from fedsigma.common.wire.codec import download_level, encode
from fedsigma.common.wire.records import StudySpec, TrainTask
from fedsigma.server.federation import checkpoint
from fedsigma.server.federation.aggregation import (
    Aggregator,
    RoundUpdates,
    update_statistics,
    weighted_mean_update,
)
from fedsigma.server.federation.messenger import Messenger
from fedsigma.server.federation.round_log import RoundLog, log_plan, round_line
from fedsigma.server.federation.secure_aggregation import MaskedSum, MaskedSumBuilder, masked_task
from fedsigma.server.federation.site_manager import SiteManager
from fedsigma.server.federation.site_sampling import Cohort, reported_examples, sample_sites
from fedsigma.server.federation.updates import CollectedUpdates, UpdateBuffer, collect_updates
from fedsigma.server.federation.validation import InvalidReply, check_norm, l2_norm
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["Federation", "NoModel", "RoundOutcome", "run_round", "train"]

Vector = NDArray[np.float32]
log = logging.getLogger("flwr.fedsigma")

MAX_RETRIES = 2
"""How often a round is retried that lost sites and made no model."""

TOO_FEW_OTHERS = "too few other sites replied, and the round was retried"
"""Why a valid reply of a round that was retried is not counted."""


class NoModel(FedSigmaError, RuntimeError):
    """No round produced a model."""

    code = FAILED


@dataclass(kw_only=True)
class Federation:
    """What the rounds of one study work with.

    Attributes:
        study: The study.
        site_manager: The sites that are ready.
        messenger: Sends tasks and receives replies.
        run_dir: Where rounds, events and checkpoints are written.
        aggregator: The study's aggregation rule.
        partition: Which values are shared; these alone are sent and averaged.
        fingerprint: Of the server's backbone and basis.
        examples: Training images by site, as far as sites reported them.
        last_shifts: The last shift of each site that allows its explanation, by site.
    """

    study: StudyConfig
    site_manager: SiteManager
    messenger: Messenger
    run_dir: RunDir
    aggregator: Aggregator
    partition: ParameterPartition
    fingerprint: Fingerprint
    examples: dict[str, int] = field(default_factory=dict)
    last_shifts: UpdateBuffer[str] = field(init=False)

    def log_of(self, number: int) -> RoundLog:
        """Writes what comes of a round."""
        return RoundLog(self.run_dir, self.study, self.site_manager, number)

    def __post_init__(self) -> None:
        self.last_shifts = UpdateBuffer(self.partition.shared.size, self.run_dir.path)

    def explainable_shifts(self) -> Iterator[tuple[str, Vector]]:
        """The last shift of each site that still allows its explanation, by name; none under masks."""
        allowed = self.site_manager.allow_explanation & self.last_shifts.keys()
        return ((site, self.last_shifts[site]) for site in sorted(allowed))


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """What one attempt at a round came to.

    Attributes:
        shift: The next global shift, shape (values,), float32; None if too few replies were accepted.
        cohort: The sites that were sent the task.
        accepted: Names of the sites whose updates were accepted.
        lost: Nodes whose connection or machine was lost.
        attempt: Number of the round's last masked cohort.
        examples: Training images of the accepted sites, by name.
        metrics: Metrics over all sites, of the shift that the round began with.
        bytes_up: Size of all replies, bytes.
    """

    shift: Vector | None = None
    cohort: Cohort
    accepted: list[str]
    lost: frozenset[int]
    attempt: int = 0
    examples: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    bytes_up: int = 0


def train(federation: Federation, shift: Vector, *, done: int = 0) -> Vector:
    """Run the rounds that are left.

    Args:
        federation: What the rounds work with.
        shift: The global shift to begin with, shape (values,), float32.
        done: Rounds that an earlier process finished.

    Returns:
        The global shift after the last round, shape (values,).

    Raises:
        TooFewSites: Not enough sites are ready in time.
        NoModel: There were rounds to run, and no round ever produced a model.
        AggregationError: The rule's result is not finite.
    """
    settings, run_dir = federation.study.federation, federation.run_dir
    if done:
        federation.examples |= reported_examples(run_dir.rounds(), federation.study, done=done)
    if done < settings.rounds:
        log_plan(federation.study, federation.aggregator, federation.site_manager.names.values())
    has_model = bool(done) or done >= settings.rounds
    for number in range(done + 1, settings.rounds + 1):
        if federation.site_manager.budgets_exhausted():
            log.info("round %d and later are left out: privacy budgets are exhausted", number)
            run_dir.log_event("budgets_exhausted", round=number)
            break
        started = time.monotonic()
        outcome = _run_with_retries(federation, number, shift)
        federation.examples |= outcome.examples
        if outcome.shift is not None:
            shift, has_model = outcome.shift, True
            checkpoint.save(
                run_dir,
                federation.aggregator,
                shift,
                study=federation.study,
                split=federation.partition,
                fingerprint=federation.fingerprint,
                round=number,
            )
        seconds = time.monotonic() - started
        ok = outcome.shift is not None
        run_dir.log_event("round_end", round=number, sites=outcome.accepted, seconds=round(seconds, 3), ok=ok)
        log.info(
            round_line(
                number,
                accepted=len(outcome.accepted),
                asked=len(outcome.cohort.sites),
                metrics=outcome.metrics,
                seconds=seconds,
                bytes_up=outcome.bytes_up,
                ok=ok,
            )
        )
    if not has_model:
        raise NoModel(
            f"none of {settings.rounds - done} rounds had {settings.min_sites} accepted replies:"
            f" see the events in {run_dir.path / 'events.jsonl'}"
        )
    return shift


def _run_with_retries(federation: Federation, number: int, shift: Vector) -> RoundOutcome:
    """Run a round, and again if it made no model because connections were lost.

    Where only some sites were lost, others are sampled in their place: the lost ones may hang for long.
    """
    outcome = run_round(federation, number, shift)
    for _ in range(MAX_RETRIES):
        if outcome.shift is not None or not outcome.lost:
            break
        federation.run_dir.log_event("round_retried", round=number, sites=outcome.accepted)
        for site in outcome.accepted:
            federation.run_dir.log_round(number, site, {}, 0, 0, "failed", TOO_FEW_OTHERS)
        excluded = outcome.lost if len(outcome.lost) < len(outcome.cohort.sites) else frozenset[int]()
        outcome = run_round(federation, number, shift, attempt=outcome.attempt + 1, excluded=excluded)
    return outcome


def run_round(
    federation: Federation,
    number: int,
    shift: Vector,
    *,
    attempt: int = 0,
    excluded: Set[int] = frozenset(),
) -> RoundOutcome:
    """Run one round: sample sites, send them the global shift, collect their updates, aggregate.

    Args:
        federation: What the round works with.
        number: Number of the round, from 1.
        shift: The global shift, shape (values,), float32.
        attempt: Number of masked cohorts that the round had before.
        excluded: Nodes that are left out if enough others are ready.

    Raises:
        TooFewSites: Not enough sites are ready in time.
        AggregationError: The rule's result is not finite.
    """
    study = federation.study
    cohort, round_log = _sample_cohort(federation, number, excluded), federation.log_of(number)
    round_log.event("round_start", sites=list(cohort.sites.values()))
    task = make_task(federation, number, shift, cohort)
    if study.federation.masking:
        return _run_masked_round(federation, round_log, shift, cohort, task, attempt)
    replies = federation.messenger.send_tasks(
        dict.fromkeys(cohort.sites, task),
        kind=MessageType.TRAIN,
        timeout=study.federation.round_timeout_s,
        group=str(number),
    )
    layout = federation.partition.shared
    with closing(UpdateBuffer[int](layout.size, federation.run_dir.path)) as buffer:
        received = collect_updates(
            replies, buffer, nodes=cohort.sites, study=study, layout=layout, shift=shift
        )
        updates = received.scaled(cohort.factors)
        mean, metrics = _mean_and_log(federation, round_log, cohort, updates, buffer)
        _keep_last_shifts(federation, cohort, updates, buffer, shift)
        next_shift = None
        if len(updates.accepted) >= study.federation.min_sites:
            each = (
                (buffer[node], update.weight, update.reply.loss) for node, update in updates.accepted.items()
            )
            next_shift = federation.aggregator.step(shift, RoundUpdates(mean=mean, each=each), round=number)
    return RoundOutcome(
        shift=next_shift,
        cohort=cohort,
        accepted=[cohort.sites[node] for node in updates.accepted],
        lost=updates.lost,
        attempt=attempt,
        examples={cohort.sites[node]: int(update.weight) for node, update in received.accepted.items()},
        metrics=metrics,
        bytes_up=sum(reply.bytes_up for reply in updates.replies.values()),
    )


def _mean_and_log(
    federation: Federation,
    round_log: RoundLog,
    cohort: Cohort,
    updates: CollectedUpdates,
    buffer: UpdateBuffer[int],
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Compute the mean update and log every reply; returns the mean and the metrics over all sites.

    Where whole sites are protected the mean has noise, and nothing is logged of single updates, which have
    none.
    """
    privacy, accepted = federation.study.privacy, updates.accepted
    mean = np.zeros(federation.partition.shared.size)
    statistics: dict[int, dict[str, float]] = {}
    enough = len(accepted) >= federation.study.federation.min_sites
    if accepted and not privacy.of_sites:
        mean = weighted_mean_update(accepted, buffer)
        statistics = update_statistics(accepted, buffer, mean)
    elif enough and privacy.of_sites:
        mean = noisy_mean((buffer[node] for node in accepted), privacy)
    for node, reply in updates.replies.items():
        result = accepted.get(node, updates.rejected.get(node))
        round_log.reply(cohort.sites[node], reply, result, statistics.get(node))
    return mean, round_log.all_sites(cohort, accepted)


def _keep_last_shifts(
    federation: Federation,
    cohort: Cohort,
    updates: CollectedUpdates,
    buffer: UpdateBuffer[int],
    shift: Vector,
) -> None:
    """Keep the shifts that may be explained: of sites that allow it, unless whole sites are protected."""
    if federation.study.privacy.of_sites:
        return
    for node in updates.accepted:
        if (site := cohort.sites[node]) in federation.site_manager.allow_explanation:
            federation.last_shifts.put(site, shift.astype(np.float64) + buffer[node])


def _sample_cohort(federation: Federation, number: int, excluded: Set[int]) -> Cohort:
    ready = federation.site_manager.wait_for_sites()
    others = {node: name for node, name in ready.items() if node not in excluded}
    if len(others) >= federation.study.federation.min_sites:
        ready = others
    return sample_sites(ready, federation.study, round=number, images=federation.examples)


def make_task(federation: Federation, number: int, shift: Vector, cohort: Cohort) -> TrainTask:
    """Build the task of a round; the download is coded as the study's codec says."""
    study = federation.study
    settings, steps = study.federation, study.training.local_steps
    return TrainTask(
        study=StudySpec.of(study),
        recipe=replace(study.training, proximal=federation.aggregator.proximal),
        mode="round",
        round=number,
        cohort=len(cohort.sites),
        first_step=(number - 1) * steps,
        steps=steps,
        total_steps=settings.rounds * steps,
        codec=settings.codec,
        privacy=study.privacy,
        evaluate=(number - 1) % settings.evaluate_every == 0,
        run=federation.run_dir.key,
        shift=encode(
            shift,
            federation.partition.shared,
            level=download_level(settings.codec),
            seed=derive_seed(study.seed, "pooled", "round", number, "codec"),
        ),
    )


def _run_masked_round(
    federation: Federation,
    round_log: RoundLog,
    shift: Vector,
    cohort: Cohort,
    task: TrainTask,
    attempt: int,
) -> RoundOutcome:
    """As `run_round`, where the server learns the sum of a cohort alone.

    Without a site the sum cannot be read: the round is repeated with the cohort of those that replied.
    """
    settings, nodes = federation.study.federation, list(cohort.sites)
    bytes_up, bytes_down, lost = Counter[int](), Counter[int](), set[int]()
    while True:
        members = {node: federation.site_manager.members[node] for node in nodes}
        task = masked_task(task, members, federation.study, attempt=attempt)
        builder = MaskedSumBuilder(federation.partition.shared, steps=task.steps)
        replies = federation.messenger.send_tasks(
            dict.fromkeys(nodes, task),
            kind=MessageType.TRAIN,
            timeout=settings.round_timeout_s,
            group=str(round_log.number),
        )
        for reply in replies:
            bytes_up[reply.node] += reply.bytes_up
            bytes_down[reply.node] += reply.bytes_down
            lost |= {reply.node} if reply.connection_lost else set()
            builder.add(reply)
            del reply  # the loop variable would keep it in memory while the next one is awaited
        complete = [node for node in nodes if node in builder.added]
        for node in nodes:
            if node not in builder.added:
                round_log.reply(cohort.sites[node], builder.replies[node], builder.rejected.get(node))
        accepted = [cohort.sites[node] for node in complete]
        if len(complete) == len(nodes) or len(complete) < settings.min_sites:
            break
        round_log.event("masked_round_retried", sites=accepted)
        nodes, attempt = complete, attempt + 1
    outcome = RoundOutcome(
        cohort=cohort, accepted=[], lost=frozenset(lost), attempt=attempt, bytes_up=bytes_up.total()
    )
    if len(complete) < settings.min_sites:
        return outcome
    outcome = replace(outcome, accepted=accepted)
    masked_sum = _read_masked_sum(federation, round_log, shift, builder, task)
    if masked_sum is None:
        return outcome
    for node in complete:
        site, digests = cohort.sites[node], builder.replies[node].traces
        round_log.event("reply_accepted", site=site, metrics={}, **digests)
        round_log.row(site, {}, "accepted", up=bytes_up[node], down=bytes_down[node])
    metrics = round_log.totals(masked_sum.metrics)
    updates = RoundUpdates(mean=masked_sum.mean)
    next_shift = federation.aggregator.step(shift, updates, round=round_log.number)
    return replace(outcome, shift=next_shift, metrics=metrics)


def _read_masked_sum(
    federation: Federation, round_log: RoundLog, shift: Vector, builder: MaskedSumBuilder, task: TrainTask
) -> MaskedSum | None:
    """Read the sum of a complete cohort; None, with an event, if it cannot be right."""
    try:
        masked_sum = builder.sum(task)
        check_norm(
            l2_norm(shift.astype(np.float64) + masked_sum.mean), federation.study.federation.norm_bound
        )
    except InvalidReply as error:
        round_log.event("masked_sum_rejected", reason=str(error))
        return None
    return masked_sum
