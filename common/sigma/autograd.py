"""The two ways to compute with U diag(s0 + d) V^T: as a dense weight, and factored, without building it.

A plain layer of a weight (r, c) and rank k = min(r, c) costs r c multiplications a token forward and as many
for each of the two gradients backward. The dense way costs that, 3 r c, and the weight and its gradient
once a step. The factored way costs k (r + c) forward and again backward, for the gradient of d needs no
product of its own: 2 k (r + c). So a weight whose longer side is more than twice its rank, as an mlp's, is
cheaper factored, and a square one dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedsigma.common.utils.errors import FedSigmaError

# Rows of a packed weight, their values within the shift's part for this weight, U and V^T.
Block = tuple[tuple[int, int], tuple[int, int], Tensor, Tensor]


def is_factored_cheaper(rows: int, columns: int) -> bool:
    """Whether a training step multiplies less by U and V than by the dense weight."""
    return max(rows, columns) > 2 * min(rows, columns)


def autocast_dtype(like: Tensor) -> torch.dtype:
    """What matrices are multiplied in on a tensor's device: autocast's choice, or the tensor's own."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


class DenseShift(torch.autograd.Function):
    """W0 with U diag(d) V^T added to row blocks.

    The derivative needs no dense matrix product with the data: dL/dd_k = u_k^T (dL/dW) v_k.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shift: Tensor, blocks: list[Block]) -> Tensor:
        """The shifted weight (rows, columns); shift (values,) is the part that belongs to it."""
        dtype = autocast_dtype(weight)
        # The sum stays in the weight's own precision: models ask their weights for a dtype (open_clip's
        # get_cast_dtype), and zero must change no bit.
        out = weight.clone()
        for (low, high), (start, stop), u, vh in blocks:
            scaled = (u * shift[start:stop]).to(dtype)
            if dtype == out.dtype:
                out[low:high].addmm_(scaled, vh)
            else:
                out[low:high] += scaled @ vh.to(dtype)
        ctx.blocks, ctx.dtype, ctx.shift_like = blocks, dtype, shift
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        """The shift's gradient (values,)."""
        (grad,) = grads
        result = torch.zeros_like(ctx.shift_like)
        for (low, high), (start, stop), u, vh in ctx.blocks:
            left = u.t().to(ctx.dtype) @ grad[low:high].to(ctx.dtype)
            result[start:stop] = (left.to(vh.dtype) * vh).sum(1)
        return None, result, None


def sum_per_example(left: Tensor, right: Tensor, examples: int) -> Tensor:
    """The products of left and right (tokens, k), summed over the tokens of each example: (examples, k).

    In float32, whatever they were multiplied in: a sum over hundreds of tokens needs it.
    """
    return (left.float() * right).view(examples, -1, left.shape[-1]).sum(1)


class FactoredLinear(torch.autograd.Function):
    """y = (x V * s) U^T + bias, for x (..., columns), U (rows, k), s (k,), V^T (k, columns).

    With a = x V and b = (dL/dy) U: dL/ds_k = sum of a_k b_k over the tokens, and dL/dx = (b * s) V^T. Only a
    is kept for the way back. U and V^T are in the dtype to multiply in, s in its own.

    With `each` (examples, k), whose values are not used, the sums over each example's tokens become its
    gradient, and s has none. The first dimension of x then holds the examples one after another.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, u: Tensor, vh: Tensor, bias: Tensor | None, each: Tensor | None = None
    ) -> Tensor:
        """The layer's output (..., rows), in the dtype of U."""
        a = x.reshape(-1, x.shape[-1]).to(u.dtype) @ vh.t()
        ctx.save_for_backward(a, s, u, vh)
        ctx.examples = None if each is None else each.shape[0]
        out = F.linear((a * s).to(u.dtype), u, None if bias is None else bias.to(u.dtype))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, Tensor | None]:
        """The gradients of x (..., columns), where it is asked for, and of s (k,) or each (examples, k)."""
        (grad,) = grads
        a, s, u, vh = ctx.saved_tensors
        b = grad.reshape(-1, grad.shape[-1]) @ u
        of_s = of_each = of_x = None
        if ctx.examples is None:
            of_s = (a.to(s.dtype) * b).sum(0)
        else:
            of_each = sum_per_example(a, b, ctx.examples)
        if ctx.needs_input_grad[0]:
            of_x = ((b * s).to(u.dtype) @ vh).view(*grad.shape[:-1], -1)
        return of_x, of_s, None, None, None, of_each


class PerSampleLinear(torch.autograd.Function):
    """y = x W^T + bias with the dense adapted weight, and the gradient of its shift for each example.

    For a block of rows with U and V^T: a = x V, b = (dL/dy of these rows) U, and an example's gradient is the
    sum of a b over its tokens, as in `FactoredLinear` (Goodfellow 2015, arXiv:1510.01799, has it for a dense
    weight and its norm). Both are computed on the way back, so that x alone is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        each: Tensor,
        blocks: list[Block],
        vh: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The layer's output (..., rows), in the dtype of the weight.

        Args:
            ctx: autograd's.
            x: (examples or a multiple of it, ..., columns), the examples one after another.
            weight: (rows, columns).
            each: (examples, values), whose gradient is asked for; its values are not used.
            blocks: as of `DenseShift`, U in the weight's dtype.
            vh: the blocks' V^T one above the other (values, columns), in the weight's dtype.
            bias: (rows,).
        """
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        ctx.save_for_backward(flat, weight, vh)
        ctx.blocks, ctx.examples, ctx.shape = blocks, each.shape[0], x.shape
        return F.linear(flat, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, None, None, None]:
        """The gradients of x, where it is asked for, and of each (examples, values), float32."""
        flat, weight, vh = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        a = flat @ vh.t()
        b = torch.cat([grad[:, low:high] @ u for (low, high), _, u, _ in ctx.blocks], 1)
        of_x = (grad @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, sum_per_example(a, b, ctx.examples), None, None, None


class PerSampleUnsupported(FedSigmaError, RuntimeError):
    """A model whose examples' gradients cannot be told apart in one backward pass."""


class UnavailableWeight(torch.autograd.Function):
    """A weight of which the shape and dtype may be asked (open_clip does), but not the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shift: Tensor) -> Tensor:
        """The weight as it is, without the shift: whatever is computed from it does not count."""
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """Raises PerSampleUnsupported: a gradient of the whole weight is no example's own."""
        raise PerSampleUnsupported("a layer computes with its adapted weight in a way of its own")
