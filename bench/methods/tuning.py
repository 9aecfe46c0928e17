"""Named tensors trained in place of a sigma shift, by the product's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

State = dict[str, Tensor]
"""The tensors that a method trains and sends, by name."""
Weights = Callable[[Mapping[str, Tensor]], State]
"""From the trained tensors to the weights of the model that they replace."""


class _Replacement(nn.Module):
    """Replaces a weight by another tensor while one is set."""

    def __init__(self) -> None:
        super().__init__()
        self.value: tuple[Tensor, ...] = ()

    def forward(self, weight: Tensor) -> Tensor:
        return self.value[0] if self.value else weight


class TensorShift:
    """Replaces `ClipClassifier`'s `SigmaModel`: one vector, `shift`, holds all trained tensors.

    So `training.train` and `training.evaluate` serve every method, with the same batches, augmentation,
    schedule, optimiser and precision.

    Args:
        model: It is frozen in place.
        start: The initial tensors, float32.
        weights: Computes weights of the model, by parameter name, from the tensors; none by default.
        towers: Towers whose features depend on the tensors; those of others need no gradient.

    Attributes:
        shift: All tensors one after another (values,).
        current: The tensors in the current forward pass, for heads outside the model.
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
        # What `ClipClassifier` reads of a layout: the trained towers.
        self.layout = SimpleNamespace(entries=[SimpleNamespace(tower=tower) for tower in towers])
        self.current: Mapping[str, Tensor] = {}
        self._shapes = {name: tensor.shape for name, tensor in start.items()}
        self._weights = weights
        with torch.no_grad():
            names = list(weights(start))
        self.shift = nn.Parameter(_flat(start))
        self._replacements = {name: _make_replaceable(model, name) for name in names}

    def state(self) -> State:
        """Return copies of the tensors."""
        return {name: tensor.clone() for name, tensor in self._split(self.shift.detach()).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the tensors.

        Raises:
            ValueError: Names or shapes differ from those of the start.
        """
        if {name: tensor.shape for name, tensor in state.items()} != self._shapes:
            raise ValueError(f"the state has {list(state)}, expected {list(self._shapes)} in their shapes")
        with torch.no_grad():
            self.shift.copy_(_flat({name: state[name] for name in self._shapes}))

    @contextmanager
    def inference_mode(self) -> Iterator[nn.Module]:
        """See `SigmaModel.inference_mode`."""
        with torch.no_grad():
            tensors = self._split(self.shift)
            with self._replaced(tensors, self._weights(tensors)):
                yield self.model

    @contextmanager
    def accumulate_gradients(self) -> Iterator[nn.Module]:
        """See `SigmaModel.accumulate_gradients`: weights are computed once and gradients add up on them."""
        tensors = self._split(self.shift)
        weights = self._weights(tensors)
        values = [*tensors.values(), *weights.values()]
        leaves = [value.detach().requires_grad_() for value in values]
        count = len(tensors)
        with self._replaced(
            dict(zip(tensors, leaves[:count], strict=True)), dict(zip(weights, leaves[count:], strict=True))
        ):
            yield self.model
        pairs = [
            (value, leaf.grad) for value, leaf in zip(values, leaves, strict=True) if leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])

    def to(self, device: torch.device | str) -> TensorShift:
        """Move the model and the tensors."""
        self.model.to(device)
        self.shift.data = self.shift.data.to(device)
        return self

    def _split(self, flat: Tensor) -> State:
        # One split, not a slice a tensor: its gradient is one concatenation.
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    @contextmanager
    def _replaced(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
        self.current = tensors
        for name, replacement in self._replacements.items():
            replacement.value = (weights[name],)
        try:
            yield
        finally:
            self.current = {}
            for replacement in self._replacements.values():
                replacement.value = ()


def _flat(state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in state.values()])


def _make_replaceable(model: nn.Module, weight: str) -> _Replacement:
    path, _, name = weight.rpartition(".")
    replacement = _Replacement()
    parametrize.register_parametrization(model.get_submodule(path), name, replacement, unsafe=True)
    return replacement
