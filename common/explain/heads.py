"""How much of a change belongs to each attention head.

A head reads by its rows of the value matrix and writes by its columns of the output matrix. With the change
of a matrix dW = U diag(d) V^T, U and V orthonormal, the part of it in the rows R of a head has the energy

    ||dW[R, :]||_F^2 = sum_i d_i^2 ||U[R, i]||^2,

since the rows of V^T are orthonormal, and likewise ||dW[:, C]||_F^2 = sum_i d_i^2 ||V^T[i, C]||^2 for
columns C. So each singular direction is divided among the heads by the energy of its vector in each head's
slice, which sums to 1, and not by its index; and the heads' energies sum to ||dW||_F^2 = ||d||^2 where no
vector has energy outside of all slices, as in square matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fedsigma.common.sigma.basis import SVD, Basis
from fedsigma.common.sigma.layout import Entry
from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "AttentionLayer",
    "ExplainError",
    "HeadEnergy",
    "find_attention_layers",
    "head_matrices",
    "rank_heads",
]

_COUNTS = ("num_heads", "num_attention_heads")


class ExplainError(FedSigmaError, ValueError):
    """What was adapted cannot be explained by heads or in words."""


@dataclass(frozen=True)
class AttentionLayer:
    """The value and output matrices of one layer whose heads can be told apart.

    Fields: tower; layer, from 0; heads, their number; value and output, each an entry of the layout with its
    decomposition.
    """

    tower: str
    layer: int
    heads: int
    value: tuple[Entry, SVD]
    output: tuple[Entry, SVD]

    def rows(self, head: int) -> slice:
        """The rows of the value matrix, and the columns of the output matrix, that are a head's."""
        width = self.value[1].u.shape[0] // self.heads
        return slice(head * width, (head + 1) * width)


@dataclass(frozen=True)
class HeadEnergy:
    """One head's part of a change.

    Fields: tower; layer and head, from 0; value and output, the energies ||dW||_F^2 of its slices; share, of
    both together among all heads of all layers, between 0 and 1.
    """

    tower: str
    layer: int
    head: int
    value: float
    output: float
    share: float


def rank_heads(model: nn.Module, basis: Basis, shift: Tensor) -> list[HeadEnergy]:
    """How much of a shift belongs to each head, the most first.

    Shapes: shift (layout size,).

    Raises:
        ExplainError: no layer has both value and output matrices among what was adapted.
    """
    found = []
    for layer in find_attention_layers(model, basis):
        values, outputs = _energies(layer, shift)
        for head in range(layer.heads):
            where = layer.rows(head)
            value, output = float(values[where].sum()), float(outputs[where].sum())
            found.append((layer.tower, layer.layer, head, value, output))
    total = sum(value + output for *_, value, output in found) or 1.0
    changes = [HeadEnergy(*one, share=(one[3] + one[4]) / total) for one in found]
    return sorted(changes, key=lambda change: change.share, reverse=True)


def find_attention_layers(model: nn.Module, basis: Basis) -> list[AttentionLayer]:
    """The layers whose value and output matrices were both adapted.

    Raises:
        ExplainError: there is none.
    """
    parts: dict[tuple[str, int], dict[str, tuple[Entry, SVD]]] = {}
    for entry, svd in zip(basis.layout.entries, basis.svds, strict=True):
        parts.setdefault((entry.tower, entry.layer), {})[entry.part] = (entry, svd)
    found = [
        AttentionLayer(tower, number, heads, both["v"], both["o"])
        for (tower, number), both in parts.items()
        if {"v", "o"} <= set(both) and (heads := _heads(model, both["v"][0].weight))
    ]
    if not found:
        raise ExplainError(
            "no layer has both its value and output matrices adapted: a study with parts [v, o] among its"
            " sigma.parts can be explained by heads"
        )
    return found


def _energies(layer: AttentionLayer, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of the value matrix's change, and of each column of the output matrix's: ||.||^2."""
    (value, read), (output, written) = layer.value, layer.output
    rows = read.u.double().square() @ _of(value, shift).square()
    columns = _of(output, shift).square() @ written.vh.double().square()
    return rows, columns


def _of(entry: Entry, shift: Tensor) -> Tensor:
    return shift[entry.offset : entry.offset + entry.size].double()


def _heads(model: nn.Module, weight: str) -> int:
    """The number of heads of the attention that a value matrix belongs to; 0 if it does not say."""
    for path in _parents(weight):
        module = model.get_submodule(path)
        for name in _COUNTS:
            if isinstance(count := getattr(module, name, None), int):
                return count
    return 0


def _parents(weight: str) -> Iterator[str]:
    path = weight.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]


def head_matrices(layer: AttentionLayer, head: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """A head's W_o[:, C] and W_v[R, :], as they were pretrained or with a shift.

    Shapes: (rows of the output matrix, width of the head) and (width of the head, columns of the value
    matrix), float64.
    """
    where = layer.rows(head)
    (value, read), (output, written) = layer.value, layer.output
    # Cut before they are multiplied: a head's slice costs a head's share of the whole matrix.
    writes = written.u.double() * _values(output, written, shift) @ written.vh[:, where].double()
    reads = read.u[where].double() * _values(value, read, shift) @ read.vh.double()
    return writes, reads


def _values(entry: Entry, svd: SVD, shift: Tensor | None) -> Tensor:
    return svd.s.double() if shift is None else svd.s.double() + _of(entry, shift)
