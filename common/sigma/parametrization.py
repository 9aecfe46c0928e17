"""The parametrization of one weight: the frozen matrix plus U diag(d) V^T, see `autograd`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fedsigma.common.sigma.autograd import (
    Block,
    DenseShift,
    FactoredLinear,
    UnavailableWeight,
    autocast_dtype,
)
from fedsigma.common.sigma.basis import Basis
from fedsigma.common.sigma.layout import Entry


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes its output by `nn.Linear.forward`."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


class SigmaParametrization(nn.Module):
    """Adds U diag(d) V^T to one weight, which may hold several matrices.

    The shift belongs to the `SigmaModel` and is not registered here, so that the adapted model has no new
    parameters and an unchanged state dict.

    Args:
        entries: the layout's entries of this weight, in order.
        basis: the basis that has their singular vectors.
        shift: the whole flat shift, shape (layout.size,).

    Attributes:
        entries: the layout's entries of this weight.
        columns: the positions of this weight's values in the flat shift.
        per_sample: whether per-sample gradients are computed, so that the whole weight must not be used.
    """

    u0: Tensor
    s0: Tensor
    vh0: Tensor

    def __init__(self, entries: list[Entry], basis: Basis, shift: nn.Parameter) -> None:
        super().__init__()
        self.entries = entries
        self.columns = slice(entries[0].offset, entries[-1].offset + entries[-1].size)
        self._shift = (shift,)
        self._accumulating = False
        self.per_sample = False
        self._shared: dict[str, tuple[Tensor, Tensor]] = {}
        self._cast: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        svds = dict(zip(basis.layout.entries, basis.svds, strict=True))
        for i, entry in enumerate(entries):
            for name, tensor in vars(svds[entry]).items():
                self.register_buffer(f"{name}{i}", tensor, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, of the shape of `weight`; a placeholder while `per_sample` is set."""
        if self.per_sample:
            return UnavailableWeight.apply(weight, self.values)
        return self._once("weight", partial(self._adapted, weight))

    def start_accumulating(self, owner: nn.Module) -> None:
        """Compute the adapted weight once, as a leaf on which gradients accumulate.

        If the weight's owner is a linear layer whose factored form is cheaper, it uses that form until
        `stop_accumulating`.
        """
        self._accumulating = True
        if is_plain_linear(owner) and self.uses_factored_forward(owner):
            owner.__dict__["forward"] = partial(self._linear, owner.bias)

    def uses_factored_forward(self, owner: nn.Linear) -> bool:
        """Whether a linear layer's factored form multiplies less than its dense form."""
        rows, columns = owner.out_features, owner.in_features
        return [e.rows for e in self.entries] == [(0, rows)] and max(rows, columns) > 2 * min(rows, columns)

    def stop_accumulating(self, owner: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """End `start_accumulating`; return computed tensors, each with its accumulated gradient."""
        owner.__dict__.pop("forward", None)
        shared, self._shared, self._cast, self._accumulating = self._shared, {}, {}, False
        return [(value, leaf.grad) for value, leaf in shared.values() if leaf.grad is not None]

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The result of `compute`; while gradients accumulate, one leaf by this name."""
        if not self._accumulating:
            return compute()
        if name not in self._shared:
            with torch.enable_grad():
                value = compute()
            self._shared[name] = value, value.detach().requires_grad_()
        return self._shared[name][1]

    def _adapted(self, weight: Tensor) -> Tensor:
        return DenseShift.apply(weight, self.values, self.blocks)

    @property
    def values(self) -> Tensor:
        """The shift's part for this weight, shape (values,)."""
        return self._shift[0][self.columns]

    @property
    def blocks(self) -> list[Block]:
        """The adapted row blocks, see `autograd.Block`."""
        blocks = []
        for i, entry in enumerate(self.entries):
            start = entry.offset - self.columns.start
            values = (start, start + entry.size)
            blocks.append((entry.rows, values, getattr(self, f"u{i}"), getattr(self, f"vh{i}")))
        return blocks

    def _linear(self, bias: Tensor | None, x: Tensor) -> Tensor:
        s = self._once("s", lambda: self.s0 + self.values)
        dtype = autocast_dtype(x)
        if dtype not in self._cast:
            self._cast[dtype] = self.u0.to(dtype), self.vh0.to(dtype)
        return FactoredLinear.apply(x, s, *self._cast[dtype], bias)
