"""Attention for training in bfloat16 on a CPU, where torch's fused kernel is slow.

For the few images of a micro-batch, its forward and backward pass together take more than twice as long as
plain batched products (`bench/attention.py`). In float32, on a GPU and without gradients the fused kernels
stay. For per-sample gradients an adapted layer computes its own projection (`sigma.PerSampleGradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedsigma.common.sigma.autograd import TensorFunction
from fedsigma.common.training.classifier import uses_bfloat16


class BatchedAttention(TensorFunction):
    """Scaled dot-product self-attention of packed queries, keys and values, by batched products.

    The probabilities (n, heads, length, length) are saved for the backward pass: little for a few images.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
        """Attention over qkv (n, length, 3 width), mask (length, length) added: (n, length, width)."""
        q, k, v = _split(qkv, heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        p = (scores if mask is None else scores + mask).softmax(-1).to(qkv.dtype)
        ctx.save_for_backward(qkv, p)
        out: Tensor = (p @ v).transpose(1, 2).flatten(2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of qkv (n, length, 3 width)."""
        qkv, p = ctx.saved_tensors
        q, k, v = _split(qkv, p.shape[1])
        g = torch.unflatten(grads[0], -1, (p.shape[1], -1)).transpose(1, 2)
        # The kernel of torch's own softmax: one pass over p, where the formula written out takes four.
        scores_grad = torch._softmax_backward_data(g @ v.transpose(-1, -2), p, -1, p.dtype)
        scores_grad.mul_(q.shape[-1] ** -0.5)
        qkv_grad = torch.empty_like(qkv)
        q_grad, k_grad, v_grad = _split(qkv_grad, p.shape[1])
        q_grad.copy_(scores_grad @ k)
        k_grad.copy_(scores_grad.transpose(-1, -2) @ q)
        v_grad.copy_(p.transpose(-1, -2) @ g)
        return qkv_grad, None, None


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (n, heads, length, width / heads) of the queries, keys and values in (n, length, 3 width)."""
    q, k, v = torch.unflatten(qkv, -1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


Project = Callable[[nn.MultiheadAttention, Tensor], Tensor]
Attend = Callable[[Tensor, int, Tensor | None], Tensor]


def project_packed(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The packed queries, keys and values (n, length, 3 width) of x (n, length, width)."""
    return F.linear(x, layer.in_proj_weight, layer.in_proj_bias)


def _by_products(qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    return BatchedAttention.apply(qkv, heads, mask)


def _fused(qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """As `BatchedAttention`, by torch's fused kernel."""
    q, k, v = _split(qkv, heads)
    mask = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@contextmanager
def replace_attention(
    model: nn.Module, *, products: bool, project: Project = project_packed
) -> Iterator[None]:
    """Replace the computation of a model's attention layers in the block.

    This changes torch's own and timm's layers. Other layers, and calls that are not plain self-attention,
    stay as they are. Outputs differ by rounding.

    Args:
        model: any model.
        products: use batched products, else the fused kernels.
        project: computes the packed queries, keys and values of torch's layer.
    """
    switched: list[Any] = [m for m in model.modules() if products and getattr(m, "fused_attn", None) is True]
    replaced = [
        m
        for m in model.modules()
        if isinstance(m, nn.MultiheadAttention) and type(m).forward is nn.MultiheadAttention.forward
    ]
    attend = _by_products if products else _fused
    for module in switched:
        module.fused_attn = False
    for layer in replaced:
        layer.__dict__["forward"] = partial(_attend, layer, attend, project)
    try:
        yield
    finally:
        for module in switched:
            module.fused_attn = True
        for layer in replaced:
            del layer.__dict__["forward"]


def _attend(
    layer: nn.MultiheadAttention,
    attend: Attend,
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    mask = options.get("attn_mask")
    plain = (
        query is key is value
        and query.ndim == 3
        and layer.batch_first
        and layer._qkv_same_embed_dim
        and layer.bias_k is None
        and not layer.add_zero_attn
        and not (layer.training and layer.dropout)
        and not options.get("need_weights", True)
        and not options.get("is_causal", False)
        and options.get("key_padding_mask") is None
        and (mask is None or (mask.ndim == 2 and mask.is_floating_point()))
    )
    if not plain:
        return nn.MultiheadAttention.forward(layer, query, key, value, **options)
    return layer.out_proj(attend(project(layer, query), layer.num_heads, mask)), None


def training_attention(
    model: nn.Module, precision: str, device: torch.device, project: Project = project_packed
) -> AbstractContextManager[object]:
    """The context in which a model's attention uses the faster kernel for training."""
    slow_kernel = device.type == "cpu" and uses_bfloat16(precision, device)
    if not slow_kernel and project is project_packed:
        return nullcontext()
    return replace_attention(model, products=slow_kernel, project=project)
