"""Rounds of any method in this process, without Flower's processes but with its averaging strategies.

For sigma this gives what a simulation by `flwr run` gives (`tests/integration/test_methods_bench.py`): the
draw of images, the seeds, the schedule, the coding and the order of averaging are the product's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bench.methods.method import Method, Place, Rule, Vector
from bench.methods.tuning import State
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.data.loading import SiteData
from fedsigma.common.data.sources.site_data import load_sites
from fedsigma.common.training.classifier import Example
from fedsigma.common.training.metrics import Predictions
from fedsigma.common.training.trainer import derive_seed
from fedsigma.server.federation.aggregation import Aggregator, RoundUpdates

__all__ = ["Run", "accuracy", "federate", "study_sites"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a federated run gave. upload: mean bytes of a reply; total: mean bytes that a site sent in all."""

    state: State
    upload: float
    total: float


class _Strategy:
    """The study's aggregation rule on vectors."""

    def __init__(self, study: StudyConfig) -> None:
        self.aggregator = Aggregator(study)

    def of_round(self, number: int, losses: Sequence[float]) -> Rule:
        """What the server does in a round in which the sites had these training losses."""
        return partial(self._step, number, losses)

    def _step(
        self,
        number: int,
        losses: Sequence[float],
        start: Vector,
        vectors: Sequence[Vector],
        weights: Sequence[int],
    ) -> Vector:
        updates = [vector - start for vector in vectors]
        mean = np.average(updates, axis=0, weights=weights)
        each = zip(updates, weights, losses, strict=True)
        shift = self.aggregator.step(
            start.astype(np.float32), RoundUpdates(mean=mean, each=each), round=number
        )
        return shift.astype(np.float64)


def federate(method: Method, sites: Mapping[str, Sequence[Example]], study: StudyConfig) -> Run:
    """Train a method through all rounds of a study.

    Args:
        method: its state begins anew.
        sites: training images by site, in the order of the study's partition.
        study: rounds, recipe, strategy and seed.
    """
    strategy, rounds, steps = _Strategy(study), study.federation.rounds, study.training.local_steps
    recipe = replace(study.training, proximal=strategy.aggregator.proximal)
    state = method.initial(sites)
    weights = [len(examples) for examples in sites.values()]
    total, uploads = float(sum(map(method.bytes_before, weights))), 0
    for number in range(1, rounds + 1):
        arrived, losses = [], []
        for site, examples in sites.items():
            place = Place(
                site=site,
                round=number,
                first_step=(number - 1) * steps,
                steps=steps,
                total_steps=rounds * steps,
                seed=derive_seed(study.seed, site, "round", number),
            )
            trained = method.train(state, examples, recipe, place)
            upload = method.upload(state, trained.state, place)
            arrived.append(upload.state)
            losses.append(trained.loss)
            uploads += upload.bytes
        state = method.aggregate(state, arrived, weights, strategy.of_round(number, losses))
    return Run(state=state, upload=uploads / rounds / len(sites), total=(total + uploads) / len(sites))


def study_sites(study: StudyConfig, side: int) -> dict[str, SiteData]:
    """Each site's images as a simulation of the study has them. Units: side in pixels."""
    return load_sites(study, side=side)


def accuracy(method: Method, state: State, sites: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """Accuracy at each site that has images to judge, and over all images as `all`."""
    found = {name: method.evaluate(state, held) for name, held in sites.items() if held}
    told = {**found, "all": Predictions.concatenate(list(found.values()))}
    return {name: _right(one) / len(one.labels) for name, one in told.items()}


def _right(found: Predictions) -> int:
    return int((found.probabilities.argmax(1) == found.labels).sum())
