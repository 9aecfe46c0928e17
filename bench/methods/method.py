"""What a federated method is here, and the part that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.methods.tuning import State, TensorShift
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.training import loop
from fedsigma.common.training.classifier import ClipClassifier, Example
from fedsigma.common.training.metrics import Predictions

__all__ = ["FLOAT", "Method", "Rule", "Trained", "TrainedMethod", "Turn", "Upload", "Vector", "count_values"]

FLOAT = 4
"""Bytes of a float32."""
Vector = NDArray[np.float64]
Rule = Callable[[Vector, Sequence[Vector], Sequence[int]], Vector]
"""What the server does in a round: from what went out (values,), what came back, and numbers of examples."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Where in a study one piece of work is: for the schedule of the learning rate, and for its seed."""

    site: str
    round: int
    first_step: int
    steps: int
    total_steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a site has after its local steps. loss: their mean cross-entropy."""

    state: State
    loss: float


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What the server holds of a site's state, and the bytes that it took."""

    state: State
    bytes: int


class Method(Protocol):
    """A way to adapt a backbone to the classes of a study, at sites that share what they train."""

    task: ClipClassifier

    def initial(self, sites: Mapping[str, Sequence[Example]]) -> State:
        """The state before the first round; `sites` are their training images."""
        ...

    def bytes_before(self, examples: int) -> int:
        """Bytes that a site with so many training images sends once, before the first round."""
        ...

    def train(self, state: State, examples: Sequence[Example], recipe: TrainingConfig, turn: Turn) -> Trained:
        """Make a site's local steps of one round."""
        ...

    def upload(self, start: State, trained: State, turn: Turn) -> Upload:
        """Bring a trained state to the server, as it arrives there."""
        ...

    def bytes_up(self, state: State) -> int:
        """Bytes of one upload with each value a float32."""
        ...

    def aggregate(self, start: State, states: Sequence[State], weights: Sequence[int], rule: Rule) -> State:
        """The next round's state, from the one that went out and those that came back."""
        ...

    def evaluate(self, state: State, examples: Sequence[Example]) -> Predictions:
        """Class probabilities of images."""
        ...


class TrainedMethod:
    """A method whose state is trained by gradients, and averaged value by value.

    Args:
        task: a task on `tuning`.
        tuning: holds the trained tensors.
    """

    def __init__(self, task: ClipClassifier, tuning: TensorShift) -> None:
        self.task, self._tuning = task, tuning
        self._start = tuning.state()

    def initial(self, sites: Mapping[str, Sequence[Example]]) -> State:
        """See `Method.initial`."""
        return self._start

    def bytes_before(self, examples: int) -> int:
        """See `Method.bytes_before`."""
        return 0

    def train(self, state: State, examples: Sequence[Example], recipe: TrainingConfig, turn: Turn) -> Trained:
        """See `Method.train`."""
        self._load(state)
        result = loop.train(
            self.task,
            examples,
            recipe,
            first_step=turn.first_step,
            steps=turn.steps,
            total_steps=turn.total_steps,
            seed=turn.seed,
        )
        return Trained(state=self._state(), loss=result.loss)

    def upload(self, start: State, trained: State, turn: Turn) -> Upload:
        """See `Method.upload`."""
        return Upload(state=trained, bytes=self.bytes_up(trained))

    def bytes_up(self, state: State) -> int:
        """See `Method.bytes_up`."""
        return FLOAT * count_values(state)

    def aggregate(self, start: State, states: Sequence[State], weights: Sequence[int], rule: Rule) -> State:
        """See `Method.aggregate`."""
        return self.from_vector(rule(self.to_vector(start), [self.to_vector(one) for one in states], weights))

    def to_vector(self, state: State) -> Vector:
        """What the server averages of a state (values,): all of it, unless a method says otherwise."""
        flat = torch.cat([tensor.flatten() for tensor in state.values()])
        return flat.numpy().astype(np.float64)

    def from_vector(self, vector: Vector) -> State:
        """The state of an averaged vector; the other way round than `averaged`."""
        found, start = dict[str, Tensor](), 0
        for name, tensor in self._start.items():
            part = vector[start : start + tensor.numel()].astype(np.float32)
            found[name] = torch.from_numpy(part).view(tensor.shape)
            start += tensor.numel()
        return found

    def evaluate(self, state: State, examples: Sequence[Example]) -> Predictions:
        """See `Method.evaluate`."""
        self._load(state)
        return loop.evaluate(self.task, examples)

    def _load(self, state: State) -> None:
        self._tuning.load(state)

    def _state(self) -> State:
        return self._tuning.state()


def count_values(state: State) -> int:
    """The number of values of a state."""
    return sum(tensor.numel() for tensor in state.values())
