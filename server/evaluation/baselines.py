"""What the federated model is compared with: no training, each site alone, and all images in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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
from fedsigma.server.runs.rounds_table import ALL_SITES

if TYPE_CHECKING:
    from fedsigma.common.sigma import ParameterPartition
    from fedsigma.server.federation.messenger import Messenger
    from fedsigma.server.federation.site_manager import SiteManager
    from fedsigma.server.runs.run_dir import RunDir

__all__ = ["Baselines", "method_entry", "train_pooled"]

Vector = NDArray[np.float32]
# Several shifts go to a site in one message; this keeps it below what a proxy lets through.
SHIFT_BYTES_A_MESSAGE = 8 * 1024 * 1024


def method_entry(judged: Mapping[str, SiteEvaluation]) -> dict[str, Any]:
    """Put one method's results into the form of summary.json: accuracy, per_site and metrics.

    Where sites tell them, confusion matrices come along: of each such site, and of all together if all tell,
    with the metrics that follow from them. Those stand apart from the means in metrics, so that these can be
    compared between methods whether or not matrices were told.
    """
    evaluations = _evaluations(judged)
    metrics = aggregate_metrics(evaluations)
    per_site = {site: one.accuracy for site, one in evaluations.items() if one.test_examples}
    entry: dict[str, Any] = {"accuracy": metrics.get("accuracy"), "per_site": per_site, "metrics": metrics}
    matrices = {site: _square(one.confusion) for site, one in judged.items() if one.confusion}
    if matrices:
        entry["confusion"] = {"per_site": {site: matrix.tolist() for site, matrix in matrices.items()}}
        if set(matrices) == set(per_site):
            added = np.sum(list(matrices.values()), axis=0)
            entry["confusion"] |= {"all_sites": added.tolist(), "metrics": metrics_of_confusion(added)}
    return entry


def standalone_recipe(recipe: LocalTrainingConfig) -> LocalTrainingConfig:
    """The recipe for training outside of rounds, where no server makes plain steps adaptive."""
    return replace(recipe, optimiser="adamw")


def train_pooled(learner: Trainer, study: StudyConfig, examples: Sequence[Any], *, sites: int) -> TrainOutput:
    """Train from the zero shift on these images in one place, for the steps of so many sites together."""
    steps = total_steps(study, sites)
    return learner.train(
        np.zeros(learner.layout.size, np.float32),
        examples,
        standalone_recipe(study.training),
        first_step=0,
        steps=steps,
        total_steps=steps,
        seed=derive_seed(study.seed, "pooled"),
        privacy=study.privacy,
    )


def _evaluations(judged: Mapping[str, SiteEvaluation]) -> dict[str, Evaluation]:
    return {site: one.evaluation for site, one in judged.items()}


def _square(counts: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(counts, dtype=np.int64).reshape(math.isqrt(len(counts)), -1)


class Baselines:
    """Asks the sites for evaluations, and computes the methods to compare with."""

    def __init__(
        self,
        exchange: Messenger,
        roster: SiteManager,
        folder: RunDir,
        study: StudyConfig,
        split: ParameterPartition,
    ) -> None:
        self.messenger, self.site_manager, self.run_dir = exchange, roster, folder
        self.study, self.partition, self.layout = study, split, split.shared

    def evaluate(
        self, shifts: Mapping[str, Vector], *, round: int, personal: bool = False
    ) -> dict[str, dict[str, SiteEvaluation]]:
        """Have every site evaluate every shift: name of the shift -> site -> its result.

        With `personal` each site puts its own values with the shared ones, else the pretrained ones. A site
        that fails is recorded and left out.
        """
        coded = {name: encode(shift, self.layout) for name, shift in shifts.items()}
        names = list(coded)
        most = max(1, SHIFT_BYTES_A_MESSAGE // max(len(data) for data in coded.values()))
        found: dict[str, dict[str, SiteEvaluation]] = {name: {} for name in names}
        for start in range(0, len(names), most):
            part = names[start : start + most]
            task = EvaluateTask(
                study=StudySpec.of(self.study),
                round=round,
                shifts=tuple(coded[name] for name in part),
                personal=personal,
                run=self.run_dir.key,
            )
            for site, results in self._evaluate(task).items():
                for name, one in zip(part, results, strict=True):
                    found[name][site] = one
        return found

    def _evaluate(self, task: EvaluateTask) -> dict[str, tuple[SiteEvaluation, ...]]:
        sites = self.site_manager.available()
        timeout = self.study.federation.round_timeout_s
        found: dict[str, tuple[SiteEvaluation, ...]] = {}
        for answer in self.messenger.send_tasks(dict.fromkeys(sites, task), kind="evaluate", timeout=timeout):
            site = sites[answer.node]
            if answer.timed_out:
                self.run_dir.log_event("site_timed_out", round=task.round, site=site)
            elif answer.content is None:
                self.run_dir.log_event("site_failed", round=task.round, site=site, reason=answer.failure)
            else:
                try:
                    found[site] = validate_evaluations(
                        answer.content, shifts=len(task.shifts), classes=len(self.study.classes)
                    )
                    self.run_dir.log_event(
                        "evaluation_accepted", round=task.round, site=site, **answer.traces
                    )
                except InvalidReply as error:
                    reason = str(error)
                    self.run_dir.log_event(
                        "reply_rejected", round=task.round, site=site, reason=reason, **answer.traces
                    )
        # Means over the sites must not depend, in their last bit, on who answered first.
        return {site: found[site] for site in sites.values() if site in found}

    def local_only(self) -> dict[str, Any]:
        """Train each site alone for as many steps as a site makes in the federation on average.

        Each model is judged everywhere.

        `accuracy` and `per_site` judge each site's model on its own test images; `everywhere` and
        `everywhere_per_site` judge each site's model on all sites' test images.
        """
        shifts = self._train_alone()
        if not shifts:
            return {}
        judged = self.evaluate(shifts, round=self.study.federation.rounds + 1)
        home = {site: judged[site][site] for site in shifts if site in judged[site]}
        everywhere = {site: aggregate_metrics(_evaluations(judged[site])).get("accuracy") for site in shifts}
        known = [value for value in everywhere.values() if value is not None]
        summary = method_entry(home)
        summary["everywhere"] = sum(known) / len(known) if known else None
        summary["everywhere_per_site"] = everywhere
        self._record("local_only", home)
        return summary

    def _train_alone(self) -> dict[str, Vector]:
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
        answers = self.messenger.send_tasks(dict.fromkeys(sites, task), kind="train", timeout=timeout)
        shifts: dict[str, Vector] = {}
        for answer in answers:
            reason = answer.failure or "no reply in time"
            try:
                if answer.content is None:
                    raise InvalidReply(reason)
                _, change = validate_update(
                    answer.content,
                    study=self.study,
                    layout=self.layout,
                    start=start,
                    codec=task.codec,
                    steps=steps,
                )
                shifts[sites[answer.node]] = start + change
            except InvalidReply as error:
                self.run_dir.log_event(
                    "baseline", method="local_only", site=sites[answer.node], metrics={}, reason=str(error)
                )
        return {site: shifts[site] for site in sites.values() if site in shifts}

    def pooled(self, learner: Trainer) -> dict[str, Any]:
        """Train on all sites' images in this process, for all sites' steps together; a simulation only."""
        from fedsigma.common.data.sources.site_data import load_sites

        study = self.study
        if study.data is None:
            return {}
        images = load_sites(study, side=learner.image_side)
        together = [example for one in images.values() for example in one.train]
        learned = train_pooled(learner, study, together, sites=len(images))
        judged = {}
        for name, one in images.items():
            if one.test:
                found = learner.evaluate(learned.shift, one.test)
                evaluation = Evaluation.of(found.metrics, len(one.test))
                judged[name] = SiteEvaluation(evaluation=evaluation, confusion=found.confusion)
        self._record("pooled", judged)
        return method_entry(judged)

    def _record(self, method: str, judged: Mapping[str, SiteEvaluation]) -> None:
        evaluations = _evaluations(judged)
        for site, one in evaluations.items():
            self.run_dir.log_event("baseline", method=method, site=site, metrics=one.metrics())
        self.run_dir.log_event(
            "baseline", method=method, site=ALL_SITES, metrics=aggregate_metrics(evaluations)
        )
