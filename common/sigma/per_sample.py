"""The shift's gradient of each example by itself, from one backward pass of many examples.

A layer's output is linear in its shift, so an example's gradient is a sum over its own tokens of what passes
the layer anyway, twice projected (`functions.Separated`, `functions.Factored`): a fraction of the cost of one
pass an example, which is what the gradient of a weight would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsigma.common.sigma.autograd import (
    Block,
    DenseShift,
    FactoredLinear,
    PerSampleLinear,
    PerSampleUnsupported,
    autocast_dtype,
)
from fedsigma.common.sigma.parametrization import SigmaParametrization, is_plain_linear


class PerSampleGradients:
    """Adapted layers that tell the examples of a batch apart; made by `SigmaModel.per_sample_gradients`.

    Before each forward pass `start` says how many examples it is of; after its backward pass `gradients`
    gives theirs. What goes into an adapted layer must hold the examples one after another in its first
    dimension (any number of rows each, equal for all). Packed attention must compute its projection by
    `project` (`attention.attention`). A layer that computes with its adapted weight otherwise raises
    `PerSampleUnsupported`, at the latest on the way back.

    Args:
        adapted: the adapted modules with their parametrizations.
        size: of the shift.
        device: of the model.
    """

    def __init__(
        self,
        adapted: Sequence[tuple[nn.Module, SigmaParametrization]],
        size: int,
        device: torch.device,
    ) -> None:
        self._layers = {module: _Layer(module, parametrization) for module, parametrization in adapted}
        self._size, self._device, self._examples = size, device, 0

    def start(self, batch_size: int) -> None:
        """Begin the pass of so many examples."""
        self._examples = batch_size
        for layer in self._layers.values():
            layer.start(batch_size, self._device)

    def project(self, module: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """The packed queries, keys and values (n, length, 3 width) of an attention layer."""
        layer = self._layers.get(module)
        if layer is None:
            return F.linear(x, module.in_proj_weight, module.in_proj_bias)
        return layer.compute(module.in_proj_bias, x)

    def gradients(self) -> Tensor:
        """The gradient of each example (examples, shift size), float32: of the sum of the losses."""
        out = torch.zeros(self._examples, self._size, device=self._device)
        for layer in self._layers.values():
            if layer.each.grad is not None:
                out[:, layer.columns] = layer.each.grad
        return out

    def end(self) -> None:
        """Put the layers back as they were."""
        for layer in self._layers.values():
            layer.end()


class _Layer:
    """One adapted weight, computed once and cast once for all passes."""

    def __init__(self, module: nn.Module, parametrization: SigmaParametrization) -> None:
        self._module, self._sigma = module, parametrization
        self.columns = slice(parametrization.start, parametrization.stop)
        self.each = torch.empty(0)
        self._factored: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}
        self._dense: dict[torch.dtype, tuple[Tensor, list[Block], Tensor]] = {}
        parametrization.per_sample = True
        if is_plain_linear(module):
            module.__dict__["forward"] = partial(self.compute, module.bias)

    def start(self, examples: int, device: torch.device) -> None:
        values = self.columns.stop - self.columns.start
        self.each = torch.zeros(examples, values, device=device, requires_grad=True)

    def compute(self, bias: Tensor | None, x: Tensor) -> Tensor:
        if not len(self.each) or x.shape[0] % len(self.each):
            raise PerSampleUnsupported(f"{x.shape[0]} rows are not those of {len(self.each)} examples")
        dtype = autocast_dtype(x)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if is_plain_linear(self._module) and self._sigma.uses_factored_forward(self._module):
                s, u, vh = self._parts(dtype)
                return FactoredLinear.apply(x, s, u, vh, bias, self.each)
            weight, blocks, vh = self._whole(dtype)
            return PerSampleLinear.apply(x, weight, self.each, blocks, vh, bias)

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if dtype not in self._factored:
            s = (self._sigma.s0 + self._sigma.values).detach()
            self._factored[dtype] = s, self._sigma.u0.to(dtype), self._sigma.vh0.to(dtype)
        return self._factored[dtype]

    def _whole(self, dtype: torch.dtype) -> tuple[Tensor, list[Block], Tensor]:
        if dtype not in self._dense:
            blocks = self._sigma.blocks
            with torch.no_grad():
                weight = DenseShift.apply(self._original(), self._sigma.values, blocks).to(dtype)
            blocks = [(rows, values, u.to(dtype), vh) for rows, values, u, vh in blocks]
            self._dense[dtype] = weight, blocks, torch.cat([vh for _, _, _, vh in blocks]).to(dtype)
        return self._dense[dtype]

    def _original(self) -> Tensor:
        """The weight without its shift."""
        lists: Any = self._module.parametrizations
        return next(each.original for each in lists.values() if each[0] is self._sigma)

    def end(self) -> None:
        self._module.__dict__.pop("forward", None)
        self._sigma.per_sample = False
