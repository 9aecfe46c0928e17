"""A federated method of the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bench.methods.tuning import State, TensorShift
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.training import loop
from fedsigma.common.training.classifier import ClipClassifier, Example
from fedsigma.common.training.metrics import Predictions

FLOAT = 4
"""Bytes of a float32."""
Vector = NDArray[np.float64]
Rule = Callable[[Vector, Sequence[Vector], Sequence[int]], Vector]
"""The server's aggregation of a round: from the vector sent, those received, and numbers of examples."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One site's work of one round: its steps in the study's schedule, and its seed."""

    site: str
    round: int
    first_step: int
    steps: int
    total_steps: int
    seed: int


class Method:
    """A way to adapt a backbone to a study's classes: tensors trained by gradients and averaged by value.

    Args:
        task: A classifier on `tuning`.
        tuning: Holds the trained tensors.
    """

    def __init__(self, task: ClipClassifier, tuning: TensorShift) -> None:
        self.task, self._tuning = task, tuning
        self._start = tuning.state()

    def initial(self, sites: Mapping[str, Sequence[Example]]) -> State:
        """Return the state before the first round, given the sites' training images."""
        return self._start

    def bytes_before(self, examples: int) -> int:
        """Return the bytes that a site with so many training images sends once, before the first round."""
        return 0

    def train(
        self, state: State, examples: Sequence[Example], recipe: TrainingConfig, turn: Turn
    ) -> tuple[State, float]:
        """Make a site's local steps of one round; returns the new state and the mean loss."""
        self._load(state)
        steps = {"first_step": turn.first_step, "steps": turn.steps, "total_steps": turn.total_steps}
        loss = loop.train(self.task, examples, recipe, **steps, seed=turn.seed)
        return self._state(), loss

    def upload(self, start: State, trained: State, turn: Turn) -> tuple[State, int]:
        """Return a trained state as it arrives at the server, and the bytes of the upload."""
        return trained, self.bytes_up(trained)

    def bytes_up(self, state: State) -> int:
        """Return the bytes of one upload with each value a float32."""
        return FLOAT * count_values(state)

    def aggregate(self, start: State, states: Sequence[State], weights: Sequence[int], rule: Rule) -> State:
        """Return the next round's state, from the one sent and those received."""
        vectors = [self.to_vector(state) for state in states]
        return self.from_vector(rule(self.to_vector(start), vectors, weights))

    def to_vector(self, state: State) -> Vector:
        """Return what the server averages of a state (values,)."""
        flat = torch.cat([tensor.flatten() for tensor in state.values()])
        return flat.numpy().astype(np.float64)

    def from_vector(self, vector: Vector) -> State:
        """Return the state of an averaged vector."""
        parts = np.split(vector, np.cumsum([tensor.numel() for tensor in self._start.values()])[:-1])
        return {
            name: torch.from_numpy(part.astype(np.float32)).view(tensor.shape)
            for part, (name, tensor) in zip(parts, self._start.items(), strict=True)
        }

    def evaluate(self, state: State, examples: Sequence[Example]) -> Predictions:
        """Return the class probabilities of images."""
        self._load(state)
        return loop.evaluate(self.task, examples)

    def _load(self, state: State) -> None:
        self._tuning.load(state)

    def _state(self) -> State:
        return self._tuning.state()


class Untrained(Method):
    """Mixin of methods that train and send nothing in a round."""

    def train(
        self, state: State, examples: Sequence[Example], recipe: TrainingConfig, turn: Turn
    ) -> tuple[State, float]:
        """Return the state."""
        return state, 0.0

    def upload(self, start: State, trained: State, turn: Turn) -> tuple[State, int]:
        """Return the state and no bytes."""
        return trained, 0

    def bytes_up(self, state: State) -> int:
        """Return zero."""
        return 0


def count_values(state: State) -> int:
    """Return the number of values of a state."""
    return sum(tensor.numel() for tensor in state.values())
