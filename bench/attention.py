"""Attention with its gradient: FedSigma's batched products against torch's fused kernel, on the processor.

    python -m bench.attention --json out/attention.json

Each row is one layer's self-attention, forward and back, of packed queries, keys and values with random
values: milliseconds of both, run in turns, and the relative error of each one's gradient against float32's.
Training uses the products where they are faster: in bfloat16.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import Table, argument_parser, parse_arguments, timed, write_json
from fedsigma.common.training.attention import BatchedAttention
from fedsigma.common.training.classifier import supports_bfloat16

SHAPES = {
    "ViT-B/16, 8 images": (8, 197, 12),
    "ViT-B/16, 32 images": (32, 197, 12),
    "ViT-B/32, 64 images": (64, 50, 12),
    "ViT-L/14 at 336, 4 images": (4, 577, 16),
    "text, 8 prompts": (8, 16, 8),
}
"""Images (or prompts) at once, tokens, heads of width 64."""
HEAD = 64
Form = Callable[[Tensor, int], Tensor]


def fused(qkv: Tensor, heads: int) -> Tensor:
    """Torch's kernel, called as in its own layer."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def products(qkv: Tensor, heads: int) -> Tensor:
    """FedSigma's products."""
    return BatchedAttention.apply(qkv, heads, None)


FORMS: dict[str, Form] = {"fused": fused, "products": products}


def gradient(form: Form, qkv: Tensor, heads: int, of_output: Tensor) -> Tensor:
    """Return the gradient of qkv (n, length, 3 heads * 64) by one form."""
    x = qkv.detach().requires_grad_()
    form(x, heads).backward(of_output)
    assert x.grad is not None
    return x.grad


def measure(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of both forms, their ratio, and both errors."""
    n, length, heads = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(n, length, 3 * heads * HEAD, generator=generator)
    of_output = torch.randn(n, length, heads * HEAD, generator=generator)
    exact = gradient(fused, qkv, heads, of_output)
    data = qkv.to(dtype), heads, of_output.to(dtype)
    errors = {f: (gradient(form, *data).float() - exact).norm() / exact.norm() for f, form in FORMS.items()}
    times: dict[str, list[float]] = {f: [] for f in FORMS}
    for _ in range(rounds):
        for f, form in FORMS.items():
            times[f].append(1000 * timed(lambda form=form: gradient(form, *data)))
    row = {f"{f}_ms": statistics.median(t) for f, t in times.items()}
    row |= {"speedup": row["fused_ms"] / row["products_ms"]}
    return row | {f"{f}_error": e.item() for f, e in errors.items()}


def main() -> None:
    """Measure and print."""
    options = parse_arguments(argument_parser(__doc__, rounds=9, rounds_help="timed calls of each form"))
    native = supports_bfloat16(torch.device("cpu"))
    figures: dict[str, Any] = {"native_bfloat16": native}
    print(f"bfloat16 in the processor: {'yes' if native else 'no'}; threads: {torch.get_num_threads()}")
    columns = {"shape": "<28", "fused ms": ">9.1f", "products": ">9.1f", "speed-up": ">9.2f"}
    table = Table(columns | {"error of fused": ">15.1e", "of products": ">12.1e"})
    for dtype in (torch.bfloat16, torch.float32):
        precision = str(dtype).removeprefix("torch.")
        print(precision)
        figures[precision] = {}
        for name, shape in SHAPES.items():
            figures[precision][name] = row = measure(shape, dtype, options.rounds)
            table.row(f"  {name}", *row.values())
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
