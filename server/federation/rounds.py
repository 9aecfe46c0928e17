"""The rounds of a study.

`train` is the loop of FedAvg (McMahan et al. 2017, arXiv:1602.05629) and `run_round` one turn of it: sample
sites, send each the global shift, collect their updates, and let the aggregation rule make the next global
shift.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Set
from contextlib import closing
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.privacy.noise import noisy_mean
from fedsigma.common.training.trainer import derive_seed
from fedsigma.common.utils.errors import FAILED, FedSigmaError
from fedsigma.common.wire.codec import download_level, encode
from fedsigma.common.wire.records import StudySpec, TrainTask
from fedsigma.server.federation import checkpoint
from fedsigma.server.federation.aggregation import update_statistics, weighted_mean_update
from fedsigma.server.federation.federation import Federation, RoundOutcome
from fedsigma.server.federation.secure_aggregation import run_masked_round
from fedsigma.server.federation.site_sampling import Cohort, reported_examples, sample_sites
from fedsigma.server.federation.updates import UpdateBuffer, collect_updates
from fedsigma.server.federation.validation import aggregation_weight

__all__ = ["NoModel", "run_round", "train"]

Vector = NDArray[np.float32]
log = logging.getLogger("flwr.fedsigma")

MAX_RETRIES = 2
"""How often a round is retried that lost sites and made no model."""
TOO_FEW_OTHERS = "too few other sites replied, and the round was retried"
"""Why a valid reply of a round that was retried is not counted."""
MAX_NAMES = 20
"""How many sites the log names."""


class NoModel(FedSigmaError, RuntimeError):
    """No round produced a model."""

    code = FAILED


def train(federation: Federation, shift: Vector, *, done: int = 0) -> Vector:
    """Run the rounds that are left.

    Args:
        federation: The sites, the aggregation rule and the run folder.
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
        _log_plan(federation)
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
            checkpoint.save(federation, shift, round=number)
        _log_end(federation, number, outcome, time.monotonic() - started)
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
        excluded = outcome.lost if len(outcome.lost) < outcome.sampled else frozenset[int]()
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
        federation: The sites, the aggregation rule and the run folder.
        number: Number of the round, from 1.
        shift: The global shift, shape (values,), float32.
        attempt: Number of masked cohorts that the round had before.
        excluded: Nodes that are left out if enough others are ready.

    Raises:
        TooFewSites: Not enough sites are ready in time.
        AggregationError: The rule's result is not finite.
    """
    study, run_dir, layout = federation.study, federation.run_dir, federation.layout
    cohort = _sample_cohort(federation, number, excluded)
    run_dir.log_event("round_start", round=number, sites=list(cohort.sites.values()))
    task = _make_task(federation, number, shift, cohort=len(cohort.sites))
    if study.federation.masking:
        return run_masked_round(federation, shift, cohort.sites, task, attempt=attempt)
    replies = federation.messenger.send_tasks(
        cohort.sites, task, kind="train", timeout=study.federation.round_timeout_s, group=str(number)
    )
    with closing(UpdateBuffer[int](layout.size, run_dir.path)) as buffer:
        updates = collect_updates(
            replies, buffer, sites=cohort.sites, task=task, study=study, layout=layout, shift=shift
        )
        accepted = {node: update.training for node, update in updates.items() if update.training is not None}
        examples = {node: aggregation_weight(reply.examples, study) for node, reply in accepted.items()}
        weights = {node: count * cohort.factors[node] for node, count in examples.items()}
        enough = len(accepted) >= study.federation.min_sites
        mean, statistics = np.zeros(layout.size), dict[int, dict[str, float]]()
        if not study.privacy.of_sites and accepted:
            mean = weighted_mean_update(weights, buffer)
            statistics = update_statistics({node: updates[node] for node in accepted}, buffer, mean)
        elif study.privacy.of_sites and enough:
            # The mean has noise, and nothing is logged of single updates, which have none.
            mean = noisy_mean((buffer[node] for node in accepted), study.privacy)
        for node, update in updates.items():
            federation.log_update(number, update, statistics.get(node))
        metrics = federation.log_training(number, list(accepted.values()))
        for node in statistics:
            if (site := cohort.sites[node]) in federation.site_manager.allow_explanation:
                federation.last_shifts.put(site, shift.astype(np.float64) + buffer[node])
        next_shift = None
        if enough:
            each = ((buffer[node], weights[node], reply.loss) for node, reply in accepted.items())
            next_shift = federation.aggregator.step(shift, mean, each, round=number)
    return RoundOutcome(
        shift=next_shift,
        sampled=len(cohort.sites),
        accepted=[cohort.sites[node] for node in accepted],
        lost=frozenset(node for node, update in updates.items() if update.reply.connection_lost),
        attempt=attempt,
        examples={cohort.sites[node]: count for node, count in examples.items()},
        metrics=metrics,
        bytes_up=sum(update.reply.bytes_up for update in updates.values()),
    )


def _sample_cohort(federation: Federation, number: int, excluded: Set[int]) -> Cohort:
    ready = federation.site_manager.wait_for_sites()
    others = {node: name for node, name in ready.items() if node not in excluded}
    if len(others) >= federation.study.federation.min_sites:
        ready = others
    return sample_sites(ready, federation.study, round=number, images=federation.examples)


def _make_task(federation: Federation, number: int, shift: Vector, *, cohort: int) -> TrainTask:
    """Build the task of a round; the download is coded as the study's codec says."""
    study = federation.study
    settings, steps = study.federation, study.training.local_steps
    return TrainTask(
        study=StudySpec.of(study),
        recipe=replace(study.training, proximal=federation.aggregator.proximal),
        mode="round",
        round=number,
        cohort=cohort,
        first_step=(number - 1) * steps,
        steps=steps,
        total_steps=settings.rounds * steps,
        codec=settings.codec,
        privacy=study.privacy,
        evaluate=(number - 1) % settings.evaluate_every == 0,
        run=federation.run_dir.key,
        shift=encode(
            shift,
            federation.layout,
            level=download_level(settings.codec),
            seed=derive_seed(study.seed, "pooled", "round", number, "codec"),
        ),
    )


def _log_plan(federation: Federation) -> None:
    """Log how the study averages, and with which sites."""
    settings, sites = federation.study.federation, list(federation.site_manager.names.values())
    more = f" and {len(sites) - MAX_NAMES:,} more" if len(sites) > MAX_NAMES else ""
    log.info("aggregation: %s %s", settings.strategy, settings.options or "")
    if federation.aggregator.needs_all_updates:
        log.info("%s needs all updates at once: memory grows with their number", settings.strategy)
    log.info("sites: %s%s", ", ".join(sites[:MAX_NAMES]), more)


def _log_end(federation: Federation, number: int, outcome: RoundOutcome, seconds: float) -> None:
    """Log the end of a round; the accuracy is that of the shift which the round began with."""
    ok, sites = outcome.shift is not None, outcome.accepted
    federation.run_dir.log_event("round_end", round=number, sites=sites, seconds=round(seconds, 3), ok=ok)
    parts = [f"{len(sites)} of {outcome.sampled} sites"]
    if "accuracy" in outcome.metrics:
        parts.append(f"accuracy {100 * outcome.metrics['accuracy']:.1f} %")
    parts += [f"{seconds:.1f} s", f"{outcome.bytes_up / 1000:,.0f} kB up"]
    log.info("round %d: %s%s", number, ", ".join(parts), "" if ok else ", no model: too few updates")
