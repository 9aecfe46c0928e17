"""Named tensors trained in place of a sigma shift, by the product's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["State", "TensorShift"]

State = dict[str, Tensor]
"""What a method trains and sends, by name."""
Weights = Callable[[Mapping[str, Tensor]], State]
"""From the trained tensors to the model's weights that they make."""


@dataclass(frozen=True)
class _Entry:
    """A tower that is trained; what `ClipClassifier` asks of a layout's entries."""

    tower: str


@dataclass(frozen=True)
class _Layout:
    entries: tuple[_Entry, ...]


class _InPlace(nn.Module):
    """Gives a weight's place to another tensor for a time."""

    def __init__(self) -> None:
        super().__init__()
        self.value: tuple[Tensor, ...] = ()

    def forward(self, weight: Tensor) -> Tensor:
        return self.value[0] if self.value else weight


class TensorShift:
    """Takes the place of `ClipClassifier`'s `SigmaModel`: one vector, `shift`, holds all trained tensors.

    So `training.train` and `training.evaluate` serve every method, and batches, augmentation, schedule,
    optimiser and precision are the same by construction.

    Args:
        model: frozen here; its weights stay what they are.
        start: the tensors to train, float32, at their start.
        weights: the model's weights (by parameter name) that the tensors make; none by default.
        towers: those whose features depend on the tensors; the features of others need no gradient.

    Attributes:
        shift: all tensors one after another (values,).
        current: the tensors as the pass under way sees them, for what is not a weight of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor],
        *,
        weights: Weights = lambda tensors: {},
        towers: Iterable[str] = (),
    ) -> None:
        self.model = model.requires_grad_(False)
        self.layout = _Layout(tuple(_Entry(tower) for tower in towers))
        self.current: Mapping[str, Tensor] = {}
        self._shapes = {name: tensor.shape for name, tensor in start.items()}
        self._weights = weights
        with torch.no_grad():
            made = list(weights(start))
        self.shift = nn.Parameter(_flat(start))
        self._places = {name: _give_place(model, name) for name in made}

    def state(self) -> State:
        """Copies of the tensors."""
        return {name: tensor.clone() for name, tensor in self._split(self.shift.detach()).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these tensors.

        Raises:
            ValueError: other names or shapes than those of the start.
        """
        if {name: tensor.shape for name, tensor in state.items()} != self._shapes:
            raise ValueError(f"the state has {list(state)}, expected {list(self._shapes)} in their shapes")
        with torch.no_grad():
            self.shift.copy_(_flat({name: state[name] for name in self._shapes}))

    @contextmanager
    def inference_mode(self) -> Iterator[nn.Module]:
        """As `SigmaModel.inference_mode`."""
        with torch.no_grad():
            tensors = self._split(self.shift)
            with self._seen(tensors, self._weights(tensors)):
                yield self.model

    @contextmanager
    def accumulate_gradients(self) -> Iterator[nn.Module]:
        """As `SigmaModel.accumulate_gradients`: weights are computed once and gradients add up on them."""
        tensors = self._split(self.shift)
        weights = self._weights(tensors)
        made = [*tensors.values(), *weights.values()]
        leaves = [value.detach().requires_grad_() for value in made]
        count = len(tensors)
        with self._seen(
            dict(zip(tensors, leaves[:count], strict=True)), dict(zip(weights, leaves[count:], strict=True))
        ):
            yield self.model
        pairs = [
            (value, leaf.grad) for value, leaf in zip(made, leaves, strict=True) if leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])

    def to(self, device: torch.device | str) -> TensorShift:
        """Move the model and the tensors."""
        self.model.to(device)
        self.shift.data = self.shift.data.to(device)
        return self

    def _split(self, flat: Tensor) -> State:
        # One split, not a slice a tensor: the way back is then one concatenation of the gradients.
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    @contextmanager
    def _seen(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
        self.current = tensors
        for name, place in self._places.items():
            place.value = (weights[name],)
        try:
            yield
        finally:
            self.current = {}
            for place in self._places.values():
                place.value = ()


def _flat(state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in state.values()])


def _give_place(model: nn.Module, weight: str) -> _InPlace:
    path, _, name = weight.rpartition(".")
    place = _InPlace()
    parametrize.register_parametrization(model.get_submodule(path), name, place, unsafe=True)
    return place
