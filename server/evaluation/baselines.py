"""Evaluation of shifts at the sites, and the baselines of a study: each site alone, and all images in one
place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.training.trainer import Trainer, TrainOutput, derive_seed
from fedsigma.common.wire.codec import encode
from fedsigma.common.wire.records import EvaluateTask, Evaluation, StudySpec, TrainTask
from fedsigma.server.federation.federation import Federation
from fedsigma.server.federation.site_sampling import total_steps
from fedsigma.server.federation.validation import (
    InvalidReply,
    SiteEvaluation,
    aggregate_metrics,
    metrics_of_confusion,
    validate_evaluations,
    validate_update,
)
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["evaluate_shifts", "local_only", "method_entry", "pooled", "train_pooled"]

Vector = NDArray[np.float32]
MAX_SHIFT_BYTES = 8 * 1024 * 1024
"""The most that the shifts of one message take; proxies limit a message's size."""


def method_entry(evaluations: Mapping[str, SiteEvaluation]) -> dict[str, Any]:
    """The results of one method, as summary.json has them.

    Args:
        evaluations: By site.

    Returns:
        `accuracy`, `per_site` and `metrics`. Where sites share their confusion matrices, `confusion` has them
        by site, and if all do, their sum and the metrics that follow from it; these are apart from `metrics`,
        so that those can be compared between methods whether or not matrices are shared.
    """
    metrics = aggregate_metrics(evaluations.values())
    per_site = {site: result.accuracy for site, result in evaluations.items() if result.test_examples}
    entry: dict[str, Any] = {"accuracy": metrics.get("accuracy"), "per_site": per_site, "metrics": metrics}
    matrices = {
        site: np.array(result.confusion, np.int64).reshape(math.isqrt(len(result.confusion)), -1)
        for site, result in evaluations.items()
        if result.confusion
    }
    if matrices:
        entry["confusion"] = {"per_site": {site: matrix.tolist() for site, matrix in matrices.items()}}
        if set(matrices) == set(per_site):
            total = np.sum(list(matrices.values()), axis=0)
            entry["confusion"] |= {"all_sites": total.tolist(), "metrics": metrics_of_confusion(total)}
    return entry


def train_pooled(trainer: Trainer, study: StudyConfig, examples: Sequence[Any], *, sites: int) -> TrainOutput:
    """Train from the zero shift on images in one place, for the steps of `sites` sites together."""
    steps = total_steps(study, sites)
    return trainer.train(
        np.zeros(trainer.layout.size, np.float32),
        examples,
        # Outside of rounds no server optimiser makes plain steps adaptive.
        replace(study.training, optimiser="adamw"),
        first_step=0,
        steps=steps,
        total_steps=steps,
        seed=derive_seed(study.seed, "pooled"),
        privacy=study.privacy,
    )


def evaluate_shifts(
    federation: Federation, shifts: Mapping[str, Vector], *, round: int, personal: bool = False
) -> dict[str, dict[str, SiteEvaluation]]:
    """Evaluate shifts at every site; a site that fails is logged and left out.

    Args:
        federation: The sites.
        shifts: By name, shape (shared values,) each.
        round: Number of the round in the events.
        personal: Whether each site combines the shared values with its own, instead of the pretrained ones.

    Returns:
        The evaluations by name of the shift and site.
    """
    coded = {name: encode(shift, federation.layout) for name, shift in shifts.items()}
    names = list(coded)
    batch = max(1, MAX_SHIFT_BYTES // max(len(data) for data in coded.values()))
    evaluations: dict[str, dict[str, SiteEvaluation]] = {name: {} for name in names}
    for start in range(0, len(names), batch):
        part = names[start : start + batch]
        task = EvaluateTask(
            study=StudySpec.of(federation.study),
            round=round,
            shifts=tuple(coded[name] for name in part),
            personal=personal,
            run=federation.run_dir.key,
        )
        for site, results in _evaluate(federation, task).items():
            for name, evaluation in zip(part, results, strict=True):
                evaluations[name][site] = evaluation
    return evaluations


def _evaluate(federation: Federation, task: EvaluateTask) -> dict[str, list[SiteEvaluation]]:
    sites, study, run_dir = federation.site_manager.available(), federation.study, federation.run_dir
    results: dict[str, list[SiteEvaluation]] = {}
    for reply in federation.messenger.send_tasks(
        sites, task, kind="evaluate", timeout=study.federation.round_timeout_s
    ):
        where = {"round": task.round, "site": sites[reply.node]}
        if reply.timed_out:
            run_dir.log_event("site_timed_out", **where)
        elif reply.content is None:
            run_dir.log_event("site_failed", **where, reason=reply.failure)
        else:
            try:
                results[sites[reply.node]] = validate_evaluations(
                    reply.content, shifts=len(task.shifts), classes=len(study.classes)
                )
                run_dir.log_event("evaluation_accepted", **where, **reply.traces)
            except InvalidReply as error:
                run_dir.log_event("reply_rejected", **where, reason=str(error), **reply.traces)
    # The last bit of a mean over the sites must not depend on who replied first.
    return {site: results[site] for site in sites.values() if site in results}


def local_only(federation: Federation) -> dict[str, Any]:
    """Train each site alone, for as many steps as a site trains in the federation on average.

    Returns:
        The entry of summary.json: `accuracy` and `per_site` evaluate each site's model on its own test
        images, `everywhere` and `everywhere_per_site` on all sites' test images. Empty if no site could
        train.
    """
    shifts = _train_locally(federation)
    if not shifts:
        return {}
    evaluations = evaluate_shifts(federation, shifts, round=federation.study.federation.rounds + 1)
    at_home = {site: evaluations[site][site] for site in shifts if site in evaluations[site]}
    everywhere = {site: aggregate_metrics(evaluations[site].values()).get("accuracy") for site in shifts}
    accuracies = [accuracy for accuracy in everywhere.values() if accuracy is not None]
    _log(federation.run_dir, "local_only", at_home)
    return method_entry(at_home) | {
        "everywhere": sum(accuracies) / len(accuracies) if accuracies else None,
        "everywhere_per_site": everywhere,
    }


def _train_locally(federation: Federation) -> dict[str, Vector]:
    sites, study, layout = federation.site_manager.available(), federation.study, federation.layout
    steps = math.ceil(total_steps(study, len(sites)) / max(1, len(sites)))
    start = np.zeros(layout.size, np.float32)
    task = TrainTask(
        study=StudySpec.of(study),
        recipe=replace(study.training, optimiser="adamw"),
        mode="local",
        round=1,
        cohort=1,
        first_step=0,
        steps=steps,
        total_steps=steps,
        codec="exact",
        evaluate=False,
        shift=encode(start, layout),
        run=federation.run_dir.key,
        privacy=study.privacy,
    )
    timeout = study.federation.round_timeout_s * study.federation.rounds
    shifts: dict[str, Vector] = {}
    for reply in federation.messenger.send_tasks(sites, task, kind="train", timeout=timeout):
        site = sites[reply.node]
        try:
            if reply.content is None:
                raise InvalidReply(reply.failure or "no reply in time")
            _, update, _ = validate_update(reply.content, task, study=study, layout=layout, start=start)
            shifts[site] = start + update
        except InvalidReply as error:
            federation.run_dir.log_event(
                "baseline", method="local_only", site=site, metrics={}, reason=str(error)
            )
    return {site: shifts[site] for site in sites.values() if site in shifts}


def pooled(federation: Federation, trainer: Trainer) -> dict[str, Any]:
    """Train on all sites' images in this process, for all sites' steps together; in simulations only.

    Returns:
        The entry of summary.json; empty outside a simulation.
    """
    from fedsigma.common.data.sources.site_data import load_sites

    study = federation.study
    if study.data is None:
        return {}
    images = load_sites(study, side=trainer.image_side)
    examples = [example for data in images.values() for example in data.train]
    shift = train_pooled(trainer, study, examples, sites=len(images)).shift
    evaluations = {}
    for site, data in images.items():
        if data.test:
            output = trainer.evaluate(shift, data.test)
            metrics = Evaluation.of(output.metrics, len(data.test))
            evaluations[site] = SiteEvaluation(**vars(metrics), confusion=output.confusion)
    _log(federation.run_dir, "pooled", evaluations)
    return method_entry(evaluations)


def _log(run_dir: RunDir, method: str, evaluations: Mapping[str, SiteEvaluation]) -> None:
    by_site = {site: evaluation.metrics() for site, evaluation in evaluations.items()}
    for site, metrics in (by_site | {ALL_SITES: aggregate_metrics(evaluations.values())}).items():
        run_dir.log_event("baseline", method=method, site=site, metrics=metrics)
