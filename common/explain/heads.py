"""The share of a shift in each attention head.

A head reads by its rows of the value matrix and writes by its columns of the output matrix. The part of
dW = U diag(d) V^T in the rows R of a head has the energy

    ||dW[R, :]||_F^2 = sum_i d_i^2 ||U[R, i]||^2,

since the rows of V^T are orthonormal, and likewise ||dW[:, C]||_F^2 = sum_i d_i^2 ||V^T[i, C]||^2 for
columns C. In square matrices the heads' energies sum to ||dW||_F^2 = ||d||^2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedsigma.common.sigma.basis import SVD, Basis
from fedsigma.common.sigma.layout import Entry
from fedsigma.common.utils.errors import FedSigmaError


class ExplainError(FedSigmaError, ValueError):
    """The adapted weights cannot be explained by heads, or descriptions are invalid."""


@dataclass(frozen=True)
class AttentionLayer:
    """The value and output matrices of one attention layer.

    Attributes:
        tower: `image` or `text`.
        layer: number within the tower, from 0.
        heads: number of heads.
        value: entry and decomposition of the value matrix.
        output: entry and decomposition of the output matrix.
    """

    tower: str
    layer: int
    heads: int
    value: tuple[Entry, SVD]
    output: tuple[Entry, SVD]

    def rows(self, head: int) -> slice:
        """A head's rows of the value matrix, and columns of the output matrix."""
        width = self.value[1].u.shape[0] // self.heads
        return slice(head * width, (head + 1) * width)


@dataclass(frozen=True)
class HeadEnergy:
    """One head's part of a shift.

    Attributes:
        tower: `image` or `text`.
        layer: number within the tower, from 0.
        head: number within the layer, from 0.
        share: of its energy in that of all heads, 0 to 1.
        value: energy ||dW||_F^2 of its slice of the value matrix.
        output: energy of its slice of the output matrix.
    """

    tower: str
    layer: int
    head: int
    share: float
    value: float
    output: float


def rank_heads(model: nn.Module, basis: Basis, shift: Tensor) -> list[HeadEnergy]:
    """The share of each head in a shift (layout size,), the largest first.

    Raises:
        ExplainError: no layer has both its value and its output matrix adapted.
    """
    heads = []
    for layer in find_attention_layers(model, basis):
        # ||.||^2 of each row of the value matrix's dW, and of each column of the output matrix's.
        (value, read), (output, write) = layer.value, layer.output
        rows = read.u.double().square() @ _part(value, shift).square()
        columns = _part(output, shift).square() @ write.vh.double().square()
        for head in range(layer.heads):
            part = layer.rows(head)
            energies = float(rows[part].sum()), float(columns[part].sum())
            heads.append(HeadEnergy(layer.tower, layer.layer, head, 0.0, *energies))
    total = sum(head.value + head.output for head in heads) or 1.0
    heads = [replace(head, share=(head.value + head.output) / total) for head in heads]
    return sorted(heads, key=lambda head: head.share, reverse=True)


def find_attention_layers(model: nn.Module, basis: Basis) -> list[AttentionLayer]:
    """The layers whose value and output matrices are both adapted, at least one.

    Raises:
        ExplainError: there is none.
    """
    parts: dict[tuple[str, int], dict[str, tuple[Entry, SVD]]] = {}
    for entry, svd in zip(basis.layout.entries, basis.svds, strict=True):
        parts.setdefault((entry.tower, entry.layer), {})[entry.part] = (entry, svd)
    layers = [
        AttentionLayer(tower, number, heads, matrices["v"], matrices["o"])
        for (tower, number), matrices in parts.items()
        if {"v", "o"} <= set(matrices) and (heads := _head_count(model, matrices["v"][0].weight))
    ]
    if not layers:
        raise ExplainError(
            "no layer has both its value and output matrices adapted: add v and o to the study's sigma.parts"
        )
    return layers


def _part(entry: Entry, shift: Tensor) -> Tensor:
    return shift[entry.offset : entry.offset + entry.size].double()


def _head_count(model: nn.Module, weight: str) -> int:
    """The number of heads of the attention that a value matrix belongs to; 0 if no module states it."""
    path = weight
    while path := path.rpartition(".")[0]:
        module = model.get_submodule(path)
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(count := getattr(module, name, None), int):
                return count
    return 0


def head_matrices(layer: AttentionLayer, head: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """A head's W_o[:, C] and W_v[R, :], float64, pretrained (without `shift`) or with a shift."""

    def singular_values(entry: Entry, svd: SVD) -> Tensor:
        return svd.s.double() if shift is None else svd.s.double() + _part(entry, shift)

    rows = layer.rows(head)
    (value, read), (output, write) = layer.value, layer.output
    writes = write.u.double() * singular_values(output, write) @ write.vh[:, rows].double()
    reads = read.u[rows].double() * singular_values(value, read) @ read.vh.double()
    return writes, reads
