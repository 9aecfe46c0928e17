"""Autograd functions for U diag(s0 + d) V^T, as a dense weight and in factored form.

The adapted weight is W(d) = W0 + U diag(d) V^T = U diag(s0 + d) V^T (CLIP-SVD: Koleilat, Rivaz and Xiao, TMLR
2026), with W0 (r, c) of rank k = min(r, c), and d (k,) the only trained values.

Cost in multiplications per token: a plain layer takes r c forward and r c for each of the two gradients. The
dense form takes the same 3 r c, and the weight and its gradient once per step. The factored form takes
k (r + c) forward and k (r + c) backward, since the gradient of d needs no product of its own. So the factored
form is cheaper where the longer side is more than twice the rank, as in most MLPs; the dense form is cheaper
for square weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedsigma.common.utils.errors import FedSigmaError

Block = tuple[tuple[int, int], tuple[int, int], Tensor, Tensor]
"""One adapted matrix of a (packed) weight: its first and last row + 1, the start and end of its values within
the shift's part for this weight, U (rows, k) and V^T (k, columns)."""


class PerSampleUnsupported(FedSigmaError, RuntimeError):
    """Per-sample gradients of this model cannot be computed in one backward pass."""


def autocast_dtype(like: Tensor) -> torch.dtype:
    """The dtype of matrix products on a tensor's device: autocast's if it is enabled, else the tensor's."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def sum_per_example(left: Tensor, right: Tensor, examples: int) -> Tensor:
    """Sum left * right, both (tokens, k), over the tokens of each example: (examples, k).

    The tokens of one example follow those of another. The result is float32 whatever the inputs are: a sum
    over hundreds of tokens needs it.
    """
    return (left.float() * right).view(examples, -1, left.shape[-1]).sum(1)


class TensorFunction(torch.autograd.Function):
    """An autograd function with one result; torch declares no type for `apply`."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *args: Any) -> Tensor:
            """Compute the result."""
            ...


class DenseShift(TensorFunction):
    """The adapted weight W0 + U diag(d) V^T.

    Its backward pass needs no dense product with the data: dL/dd_k = u_k^T (dL/dW) v_k.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shift: Tensor, blocks: list[Block]) -> Tensor:
        """The adapted weight, from W0 (rows, columns) and d of all blocks (values,), in the dtype of W0."""
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
        """The gradient of the shift, shape (values,)."""
        shift_grad = torch.zeros_like(ctx.shift_like)
        for (low, high), (start, stop), u, vh in ctx.blocks:
            left = u.t().to(ctx.dtype) @ grads[0][low:high].to(ctx.dtype)
            shift_grad[start:stop] = (left.to(vh.dtype) * vh).sum(1)
        return None, shift_grad, None


class FactoredLinear(TensorFunction):
    """The linear layer y = (x V * s) U^T + bias, without its dense weight.

    With a = x V and b = (dL/dy) U, the gradients are dL/ds_k = sum over tokens of a_k b_k, and
    dL/dx = (b * s) V^T. Only a is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        u: Tensor,
        vh: Tensor,
        bias: Tensor | None,
        sample_shifts: Tensor | None = None,
    ) -> Tensor:
        """Compute the layer's output (..., rows), in the dtype of U.

        Args:
            ctx: the autograd context.
            x: shape (..., columns).
            s: singular values s0 + d, shape (k,).
            u: U, shape (rows, k), in the dtype to multiply in.
            vh: V^T, shape (k, columns), in the same dtype.
            bias: shape (rows,), or None.
            sample_shifts: shape (examples, k); its gradient is that of each example, its values are not used.
                The first dimension of x then holds the examples one after another, and s gets no gradient.
        """
        a = x.reshape(-1, x.shape[-1]).to(u.dtype) @ vh.t()
        ctx.save_for_backward(a, s, u, vh)
        ctx.examples = None if sample_shifts is None else sample_shifts.shape[0]
        out = F.linear((a * s).to(u.dtype), u, None if bias is None else bias.to(u.dtype))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, Tensor | None]:
        """The gradients of x (..., columns), if needed, and of s (k,) or sample_shifts (examples, k)."""
        (grad,) = grads
        a, s, u, vh = ctx.saved_tensors
        b = grad.reshape(-1, grad.shape[-1]) @ u
        s_grad = sample_grads = x_grad = None
        if ctx.examples is None:
            s_grad = (a.to(s.dtype) * b).sum(0)
        else:
            sample_grads = sum_per_example(a, b, ctx.examples)
        if ctx.needs_input_grad[0]:
            x_grad = ((b * s).to(u.dtype) @ vh).view(*grad.shape[:-1], -1)
        return x_grad, s_grad, None, None, None, sample_grads


class PerSampleLinear(TensorFunction):
    """The linear layer y = x W^T + bias with the dense adapted weight, and the shift's gradient per example.

    With a = x V and b = (dL/dy of the block's rows) U, an example's gradient is the sum of a b over its
    tokens, as in `FactoredLinear` (for dense weights: Goodfellow 2015, arXiv:1510.01799). Both are computed
    in the backward pass, so that only x is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        sample_shifts: Tensor,
        blocks: list[Block],
        vh: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Compute the layer's output (..., rows), in the dtype of the weight.

        Args:
            ctx: the autograd context.
            x: shape (examples or a multiple of it, ..., columns), the examples one after another.
            weight: the adapted weight, shape (rows, columns).
            sample_shifts: shape (examples, values); its gradient is that of each example, its values are not
                used.
            blocks: the adapted row blocks, with U in the weight's dtype.
            vh: the blocks' V^T stacked, shape (values, columns), in the weight's dtype.
            bias: shape (rows,), or None.
        """
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        ctx.save_for_backward(flat, weight, vh)
        ctx.blocks, ctx.examples, ctx.shape = blocks, sample_shifts.shape[0], x.shape
        return F.linear(flat, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, None, None, None]:
        """The gradients of x, if needed, and of sample_shifts (examples, values), float32."""
        flat, weight, vh = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        a = flat @ vh.t()
        b = torch.cat([grad[:, low:high] @ u for (low, high), _, u, _ in ctx.blocks], 1)
        x_grad = (grad @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return x_grad, None, sum_per_example(a, b, ctx.examples), None, None, None


class UnavailableWeight(TensorFunction):
    """A placeholder for a weight: its shape and dtype can be read (open_clip does), but has no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shift: Tensor) -> Tensor:
        """The weight without its shift; results computed from it must not be used."""
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """Raise PerSampleUnsupported: the gradient of the whole weight mixes the examples."""
        raise PerSampleUnsupported("a layer uses its adapted weight in a way that mixes the examples")
