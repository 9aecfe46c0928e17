"""Attention with its gradient: FedSigma's batched products against torch's fused kernel, on the processor.

    python -m bench.attention --json out/attention.json

Each row is one layer's self-attention, forward and back, of packed queries, keys and values with random
values: milliseconds of both, run in turns, and the relative error of each one's gradient against float32's.
Training uses the products where they win: in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsigma.common.training.attention import BatchedAttention
from fedsigma.common.training.classifier import supports_bfloat16

# Images (or prompts) at once, tokens, heads of width 64.
SHAPES = {
    "ViT-B/16, 8 images": (8, 197, 12),
    "ViT-B/16, 32 images": (32, 197, 12),
    "ViT-B/32, 64 images": (64, 50, 12),
    "ViT-L/14 at 336, 4 images": (4, 577, 16),
    "text, 8 prompts": (8, 16, 8),
}
HEAD = 64
Form = Callable[[Tensor, int], Tensor]


def fused(qkv: Tensor, heads: int) -> Tensor:
    """torch's kernel, as its own layer calls it."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def products(qkv: Tensor, heads: int) -> Tensor:
    """FedSigma's."""
    return BatchedAttention.apply(qkv, heads, None)


FORMS: dict[str, Form] = {"fused": fused, "products": products}


def gradient(form: Form, qkv: Tensor, heads: int, of_output: Tensor) -> Tensor:
    """The gradient of qkv (n, length, 3 heads * 64) by one form."""
    x = qkv.detach().requires_grad_()
    form(x, heads).backward(of_output)
    assert x.grad is not None
    return x.grad


def measure(shape: tuple[int, int, int], kind: torch.dtype, rounds: int) -> dict[str, float]:
    """Median milliseconds of both forms, their ratio, and both errors."""
    n, length, heads = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(n, length, 3 * heads * HEAD, generator=generator)
    of_output = torch.randn(n, length, heads * HEAD, generator=generator)
    exact = gradient(fused, qkv, heads, of_output)
    data = qkv.to(kind), heads, of_output.to(kind)
    errors = {f: (gradient(form, *data).float() - exact).norm() / exact.norm() for f, form in FORMS.items()}
    times: dict[str, list[float]] = {f: [] for f in FORMS}
    for _ in range(rounds):
        for f, form in FORMS.items():
            start = time.perf_counter()
            gradient(form, *data)
            times[f].append(1000 * (time.perf_counter() - start))
    row = {f"{f}_ms": statistics.median(t) for f, t in times.items()}
    row |= {"speedup": row["fused_ms"] / row["products_ms"]}
    return row | {f"{f}_error": e.item() for f, e in errors.items()}


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    native = supports_bfloat16(torch.device("cpu"))
    print(f"bfloat16 in the processor: {'yes' if native else 'no'}; threads: {torch.get_num_threads()}")
    print(f"{'':28}{'fused ms':>10}{'products':>10}{'speed-up':>10}{'error of fused':>16}{'of products':>13}")
    for kind in (torch.bfloat16, torch.float32):
        precision = str(kind).removeprefix("torch.")
        figures[precision] = {}
        print(precision)
        for name, shape in SHAPES.items():
            figures[precision][name] = row = measure(shape, kind, a.rounds)
            print(
                f"  {name:26}{row['fused_ms']:10.1f}{row['products_ms']:10.1f}{row['speedup']:10.2f}"
                f"{row['fused_error']:16.1e}{row['products_error']:13.1e}"
            )
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({"native_bfloat16": native} | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
