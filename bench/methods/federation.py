"""Rounds of any method in this process, with the aggregation of the product.

For sigma the result equals that of a simulation (`tests/integration/test_methods_bench.py`): the draw of
images, the seeds, the schedule, the coding and the order of averaging are the product's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bench.methods.method import Method, Rule, Turn, Vector
from bench.methods.tuning import State
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.training.classifier import Example
from fedsigma.common.training.metrics import Predictions
from fedsigma.common.training.trainer import derive_seed
from fedsigma.server.federation.aggregation import Aggregator


@dataclass(frozen=True, kw_only=True)
class Run:
    """Result of a federated run.

    Attributes:
        state: The last state.
        upload: Mean bytes of a reply.
        total: Mean bytes that a site sent in all rounds.
    """

    state: State
    upload: float
    total: float


class VectorAggregator:
    """The study's aggregation rule on vectors."""

    def __init__(self, study: StudyConfig) -> None:
        self.aggregator = Aggregator(study)

    def rule_of_round(self, number: int, losses: Sequence[float]) -> Rule:
        """Return the aggregation of a round in which the sites had these training losses."""
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
        shift = self.aggregator.step(start.astype(np.float32), mean, each, round=number)
        return shift.astype(np.float64)


def federate(method: Method, sites: Mapping[str, Sequence[Example]], study: StudyConfig) -> Run:
    """Train a method through all rounds of a study.

    Args:
        method: The method; its state starts from the beginning.
        sites: Training images by site, in the order of the study's partition.
        study: Rounds, recipe, strategy and seed.
    """
    strategy, rounds, steps = VectorAggregator(study), study.federation.rounds, study.training.local_steps
    recipe = replace(study.training, proximal=strategy.aggregator.proximal)
    state = method.initial(sites)
    weights = [len(examples) for examples in sites.values()]
    total, uploads = float(sum(map(method.bytes_before, weights))), 0
    for number in range(1, rounds + 1):
        states, losses = [], []
        for site, examples in sites.items():
            turn = Turn(
                site=site,
                round=number,
                first_step=(number - 1) * steps,
                steps=steps,
                total_steps=rounds * steps,
                seed=derive_seed(study.seed, site, "round", number),
            )
            trained, loss = method.train(state, examples, recipe, turn)
            received, size = method.upload(state, trained, turn)
            states.append(received)
            losses.append(loss)
            uploads += size
        state = method.aggregate(state, states, weights, strategy.rule_of_round(number, losses))
    return Run(state=state, upload=uploads / rounds / len(sites), total=(total + uploads) / len(sites))


def accuracy(method: Method, state: State, sites: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """Return the accuracy at each site that has images, and over all images as `all`."""
    predictions = {n: method.evaluate(state, examples) for n, examples in sites.items() if examples}
    predictions["all"] = Predictions.concatenate(list(predictions.values()))
    return {name: _correct(each) / len(each.labels) for name, each in predictions.items()}


def _correct(predictions: Predictions) -> int:
    return int((predictions.probabilities.argmax(1) == predictions.labels).sum())
