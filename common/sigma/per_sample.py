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
    """

    def __init__(self, adapted: Sequence[tuple[nn.Module, SigmaParametrization]], shift: Tensor) -> None:
        self._layers = {module: _Layer(module, parametrization) for module, parametrization in adapted}
        self._shift, self._examples = shift, 0

    def start(self, batch_size: int) -> None:
        """Prepare the forward pass of a batch."""
        self._examples = batch_size
        for layer in self._layers.values():
            layer.start(batch_size, self._shift.device)

    def project(self, module: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """The packed queries, keys and values (n, length, 3 width) of the input (n, length, width)."""
        layer = self._layers.get(module)
        if layer is None:
            return F.linear(x, module.in_proj_weight, module.in_proj_bias)
        return layer.compute(module.in_proj_bias, x)

    def gradients(self) -> Tensor:
        """The gradient of each example's loss, shape (batch_size, shift size), float32."""
        gradients = torch.zeros(self._examples, len(self._shift), device=self._shift.device)
        for layer in self._layers.values():
            if layer.sample_shifts.grad is not None:
                gradients[:, layer.columns] = layer.sample_shifts.grad
        return gradients

    def end(self) -> None:
        """Restore the layers."""
        for layer in self._layers.values():
            layer.end()


class _Layer:
    """One adapted weight, computed and cast once for all passes."""

    def __init__(self, module: nn.Module, parametrization: SigmaParametrization) -> None:
        self._module, self._sigma = module, parametrization
        self.columns = parametrization.columns
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
                f"a layer's input has {x.shape[0]} rows, no multiple of {len(self.sample_shifts)} examples"
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
            parametrizations: Any = self._module.parametrizations
            original = next(p.original for p in parametrizations.values() if p[0] is self._sigma)
            with torch.no_grad():
                weight = DenseShift.apply(original, self._sigma.values, blocks).to(dtype)
            blocks = [(rows, values, u.to(dtype), vh) for rows, values, u, vh in blocks]
            self._dense[dtype] = weight, blocks, torch.cat([vh for _, _, _, vh in blocks]).to(dtype)
        return self._dense[dtype]

    def end(self) -> None:
        self._module.__dict__.pop("forward", None)
        self._sigma.per_sample = False
