"""The baselines of a study: zero-shot, each site alone, and all images in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import LocalTrainingConfig
from fedsigma.common.training.trainer import Trainer, TrainOutput, derive_seed
from fedsigma.common.wire.codec import encode
from fedsigma.common.wire.records import EvaluateTask, Evaluation, StudySpec, TrainTask
from fedsigma.server.federation.site_sampling import total_steps
from fedsigma.server.federation.validation import (
    InvalidReply,
    SiteEvaluation,
    aggregate_metrics,
    metrics_of_confusion,
    validate_evaluations,
    validate_update,
)

if TYPE_CHECKING:
    from fedsigma.common.sigma import ParameterPartition
    from fedsigma.server.federation.messenger import Messenger
    from fedsigma.server.federation.site_manager import SiteManager
    from fedsigma.server.runs.run_dir import RunDir

__all__ = ["Baselines", "method_entry", "train_pooled"]

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
    scalars = _scalars(evaluations)
    metrics = aggregate_metrics(scalars)
    per_site = {site: scalar.accuracy for site, scalar in scalars.items() if scalar.test_examples}
    entry: dict[str, Any] = {"accuracy": metrics.get("accuracy"), "per_site": per_site, "metrics": metrics}
    matrices = {
        site: _matrix(evaluation.confusion)
        for site, evaluation in evaluations.items()
        if evaluation.confusion
    }
    if matrices:
        entry["confusion"] = {"per_site": {site: matrix.tolist() for site, matrix in matrices.items()}}
        if set(matrices) == set(per_site):
            total = np.sum(list(matrices.values()), axis=0)
            entry["confusion"] |= {"all_sites": total.tolist(), "metrics": metrics_of_confusion(total)}
    return entry


def standalone_recipe(recipe: LocalTrainingConfig) -> LocalTrainingConfig:
    """The training settings outside of rounds, where no server optimiser makes plain steps adaptive."""
    return replace(recipe, optimiser="adamw")


def train_pooled(trainer: Trainer, study: StudyConfig, examples: Sequence[Any], *, sites: int) -> TrainOutput:
    """Train from the zero shift on images in one place, for the steps of `sites` sites together."""
    steps = total_steps(study, sites)
    return trainer.train(
        np.zeros(trainer.layout.size, np.float32),
        examples,
        standalone_recipe(study.training),
        first_step=0,
        steps=steps,
        total_steps=steps,
        seed=derive_seed(study.seed, "pooled"),
        privacy=study.privacy,
    )


def _scalars(evaluations: Mapping[str, SiteEvaluation]) -> dict[str, Evaluation]:
    return {site: evaluation.evaluation for site, evaluation in evaluations.items()}


def _matrix(counts: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(counts, dtype=np.int64).reshape(math.isqrt(len(counts)), -1)


class Baselines:
    """Evaluates shifts at the sites and computes the baselines of a study.

    Args:
        messenger: Sends the tasks.
        site_manager: The sites that are ready.
        run_dir: Receives the events.
        study: The study.
        partition: Which values are shared.
    """

    def __init__(
        self,
        messenger: Messenger,
        site_manager: SiteManager,
        run_dir: RunDir,
        study: StudyConfig,
        partition: ParameterPartition,
    ) -> None:
        self.messenger, self.site_manager, self.run_dir = messenger, site_manager, run_dir
        self.study, self.partition, self.layout = study, partition, partition.shared

    def evaluate(
        self, shifts: Mapping[str, Vector], *, round: int, personal: bool = False
    ) -> dict[str, dict[str, SiteEvaluation]]:
        """Evaluate shifts at every site; a site that fails is logged and left out.

        Args:
            shifts: By name, shape (shared values,) each.
            round: Number of the round in the events.
            personal: Whether each site combines the shared values with its own, instead of the pretrained
                ones.

        Returns:
            The evaluations by name of the shift and site.
        """
        coded = {name: encode(shift, self.layout) for name, shift in shifts.items()}
        names = list(coded)
        batch = max(1, MAX_SHIFT_BYTES // max(len(data) for data in coded.values()))
        evaluations: dict[str, dict[str, SiteEvaluation]] = {name: {} for name in names}
        for start in range(0, len(names), batch):
            part = names[start : start + batch]
            task = EvaluateTask(
                study=StudySpec.of(self.study),
                round=round,
                shifts=tuple(coded[name] for name in part),
                personal=personal,
                run=self.run_dir.key,
            )
            for site, results in self._evaluate(task).items():
                for name, evaluation in zip(part, results, strict=True):
                    evaluations[name][site] = evaluation
        return evaluations

    def _evaluate(self, task: EvaluateTask) -> dict[str, tuple[SiteEvaluation, ...]]:
        sites, run_dir = self.site_manager.available(), self.run_dir
        timeout = self.study.federation.round_timeout_s
        results: dict[str, tuple[SiteEvaluation, ...]] = {}
        for reply in self.messenger.send_tasks(dict.fromkeys(sites, task), kind="evaluate", timeout=timeout):
            site = sites[reply.node]
            if reply.timed_out:
                run_dir.log_event("site_timed_out", round=task.round, site=site)
            elif reply.content is None:
                run_dir.log_event("site_failed", round=task.round, site=site, reason=reply.failure)
            else:
                try:
                    results[site] = validate_evaluations(
                        reply.content, shifts=len(task.shifts), classes=len(self.study.classes)
                    )
                    run_dir.log_event("evaluation_accepted", round=task.round, site=site, **reply.traces)
                except InvalidReply as error:
                    reason = str(error)
                    run_dir.log_event(
                        "reply_rejected", round=task.round, site=site, reason=reason, **reply.traces
                    )
        # The last bit of a mean over the sites must not depend on who replied first.
        return {site: results[site] for site in sites.values() if site in results}

    def local_only(self) -> dict[str, Any]:
        """Train each site alone, for as many steps as a site trains in the federation on average.

        Returns:
            The entry of summary.json: `accuracy` and `per_site` evaluate each site's model on its own test
            images, `everywhere` and `everywhere_per_site` on all sites' test images. Empty if no site could
            train.
        """
        shifts = self._train_locally()
        if not shifts:
            return {}
        evaluations = self.evaluate(shifts, round=self.study.federation.rounds + 1)
        own = {site: evaluations[site][site] for site in shifts if site in evaluations[site]}
        everywhere = {site: aggregate_metrics(_scalars(evaluations[site])).get("accuracy") for site in shifts}
        accuracies = [accuracy for accuracy in everywhere.values() if accuracy is not None]
        entry = method_entry(own)
        entry["everywhere"] = sum(accuracies) / len(accuracies) if accuracies else None
        entry["everywhere_per_site"] = everywhere
        self._log("local_only", own)
        return entry

    def _train_locally(self) -> dict[str, Vector]:
        sites = self.site_manager.available()
        steps = math.ceil(total_steps(self.study, len(sites)) / max(1, len(sites)))
        start = np.zeros(self.layout.size, np.float32)
        task = TrainTask(
            study=StudySpec.of(self.study),
            recipe=standalone_recipe(self.study.training),
            mode="local",
            round=1,
            cohort=1,
            first_step=0,
            steps=steps,
            total_steps=steps,
            codec="exact",
            evaluate=False,
            shift=encode(start, self.layout),
            run=self.run_dir.key,
            privacy=self.study.privacy,
        )
        timeout = self.study.federation.round_timeout_s * self.study.federation.rounds
        shifts: dict[str, Vector] = {}
        for reply in self.messenger.send_tasks(dict.fromkeys(sites, task), kind="train", timeout=timeout):
            site = sites[reply.node]
            try:
                if reply.content is None:
                    raise InvalidReply(reply.failure or "no reply in time")
                _, update = validate_update(
                    reply.content,
                    study=self.study,
                    layout=self.layout,
                    start=start,
                    codec=task.codec,
                    steps=steps,
                )
                shifts[site] = start + update
            except InvalidReply as error:
                self.run_dir.log_event(
                    "baseline", method="local_only", site=site, metrics={}, reason=str(error)
                )
        return {site: shifts[site] for site in sites.values() if site in shifts}

    def pooled(self, trainer: Trainer) -> dict[str, Any]:
        """Train on all sites' images in this process, for all sites' steps together; in simulations only.

        Returns:
            The entry of summary.json; empty outside a simulation.
        """
        from fedsigma.common.data.sources.site_data import load_sites

        study = self.study
        if study.data is None:
            return {}
        images = load_sites(study, side=trainer.image_side)
        together = [example for data in images.values() for example in data.train]
        output = train_pooled(trainer, study, together, sites=len(images))
        evaluations = {}
        for site, data in images.items():
            if data.test:
                result = trainer.evaluate(output.shift, data.test)
                scalars = Evaluation.of(result.metrics, len(data.test))
                evaluations[site] = SiteEvaluation(evaluation=scalars, confusion=result.confusion)
        self._log("pooled", evaluations)
        return method_entry(evaluations)

    def _log(self, method: str, evaluations: Mapping[str, SiteEvaluation]) -> None:
        scalars = _scalars(evaluations)
        for site, evaluation in scalars.items():
            self.run_dir.log_event("baseline", method=method, site=site, metrics=evaluation.metrics())
        metrics = aggregate_metrics(scalars)
        self.run_dir.log_event("baseline", method=method, site=ALL_SITES, metrics=metrics)
