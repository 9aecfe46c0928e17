"""The shift's gradient of each example, from one backward pass for many examples.

A layer's output is linear in its shift, so an example's gradient is a sum over its tokens of products of the
layer's projected input and projected output gradient (`autograd.PerSampleLinear`, `autograd.FactoredLinear`).
This costs a fraction of one backward pass per example.
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
    """Computes per-sample gradients in the adapted layers; made by `SigmaModel.per_sample_gradients`.

    Call `start` before each forward pass, and `gradients` after its backward pass. The first dimension of
    each adapted layer's input must hold the examples one after another, each with the same number of rows.
    Packed attention must compute its projection by `project`, see `training.attention.replace_attention`. A
    layer that uses its adapted weight in any other way raises `PerSampleUnsupported`, at the latest in the
    backward pass.

    Args:
        adapted: the adapted modules with their parametrizations.
        size: number of values of the shift.
        device: the model's device.
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
        """Prepare the forward pass of a batch.

        Args:
            batch_size: number of examples.
        """
        self._examples = batch_size
        for layer in self._layers.values():
            layer.start(batch_size, self._device)

    def project(self, module: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """Compute the packed queries, keys and values of an attention layer.

        Args:
            module: the attention layer.
            x: its input, shape (n, length, width).

        Returns:
            Shape (n, length, 3 width).
        """
        layer = self._layers.get(module)
        if layer is None:
            return F.linear(x, module.in_proj_weight, module.in_proj_bias)
        return layer.compute(module.in_proj_bias, x)

    def gradients(self) -> Tensor:
        """The gradient of each example's loss, shape (batch_size, shift size), float32."""
        out = torch.zeros(self._examples, self._size, device=self._device)
        for layer in self._layers.values():
            if layer.sample_shifts.grad is not None:
                out[:, layer.columns] = layer.sample_shifts.grad
        return out

    def end(self) -> None:
        """Restore the layers."""
        for layer in self._layers.values():
            layer.end()


class _Layer:
    """One adapted weight, computed and cast once for all passes."""

    def __init__(self, module: nn.Module, parametrization: SigmaParametrization) -> None:
        self._module, self._sigma = module, parametrization
        self.columns = slice(parametrization.start, parametrization.stop)
        self.sample_shifts = torch.empty(0)
        self._factored: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}
        self._dense: dict[torch.dtype, tuple[Tensor, list[Block], Tensor]] = {}
        parametrization.per_sample = True
        if is_plain_linear(module):
            module.__dict__["forward"] = partial(self.compute, module.bias)

    def start(self, examples: int, device: torch.device) -> None:
        values = self.columns.stop - self.columns.start
        self.sample_shifts = torch.zeros(examples, values, device=device, requires_grad=True)

    def compute(self, bias: Tensor | None, x: Tensor) -> Tensor:
        if not len(self.sample_shifts) or x.shape[0] % len(self.sample_shifts):
            raise PerSampleUnsupported(
                f"{x.shape[0]} rows are no multiple of {len(self.sample_shifts)} examples"
            )
        dtype = autocast_dtype(x)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if is_plain_linear(self._module) and self._sigma.uses_factored_forward(self._module):
                s, u, vh = self._factors(dtype)
                return FactoredLinear.apply(x, s, u, vh, bias, self.sample_shifts)
            weight, blocks, vh = self._dense_weight(dtype)
            return PerSampleLinear.apply(x, weight, self.sample_shifts, blocks, vh, bias)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if dtype not in self._factored:
            s = (self._sigma.s0 + self._sigma.values).detach()
            self._factored[dtype] = s, self._sigma.u0.to(dtype), self._sigma.vh0.to(dtype)
        return self._factored[dtype]

    def _dense_weight(self, dtype: torch.dtype) -> tuple[Tensor, list[Block], Tensor]:
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
        return next(one.original for one in lists.values() if one[0] is self._sigma)

    def end(self) -> None:
        self._module.__dict__.pop("forward", None)
        self._sigma.per_sample = False
