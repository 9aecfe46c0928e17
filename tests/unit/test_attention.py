"""Attention by batched products: the same function as torch's, and only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.attention import BatchedAttention, replace_attention, training_attention
from tests.helpers.tiny import outputs, timm_clip, tiny_clip

CPU = torch.device("cpu")
CAUSAL = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)


def fused(qkv: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("mask", [None, CAUSAL])
def test_value_and_gradient_are_those_of_torchs_attention(mask: Tensor | None) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 36, dtype=torch.float64, requires_grad=True)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    of_output = torch.randn(2, 5, 12, dtype=torch.float64)
    for form, qkv in zip((fused, BatchedAttention.apply), inputs, strict=True):
        out = form(qkv, 3, mask)
        out.backward(of_output)
        torch.testing.assert_close(out, fused(inputs[0], 3, mask))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert torch.autograd.gradcheck(lambda x: BatchedAttention.apply(x, 3, mask), inputs[1])


def gradient(sigma: SigmaModel) -> Tensor:
    image, text = outputs(sigma.model)
    (grad,) = torch.autograd.grad((image @ text.T).square().sum(), sigma.shift)
    return grad


@pytest.mark.parametrize("build", [tiny_clip, timm_clip])
def test_models_give_the_same_features_and_gradients(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    sigma = SigmaModel.adapt(build(), cache_dir=tmp_path)
    expected, slope = outputs(sigma.model), gradient(sigma)
    with (
        replace_attention(sigma.model, products=True),
        patch.object(BatchedAttention, "apply", wraps=BatchedAttention.apply) as product,
    ):
        found, other = outputs(sigma.model), gradient(sigma)
    assert product.called
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(other, slope, atol=1e-4 * slope.abs().max().item(), rtol=1e-4)


def switches(model: nn.Module) -> list[object]:
    """Whatever `replace_attention` may change."""
    return [(m.__dict__.get("forward"), getattr(m, "fused_attn", None)) for m in model.modules()]


@pytest.mark.parametrize("build", [tiny_clip, timm_clip])
def test_a_model_is_left_as_it_was_even_by_an_error(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = switches(model)
    with pytest.raises(RuntimeError, match="in the block"), replace_attention(model, products=True):
        assert switches(model) != before
        raise RuntimeError("in the block")
    assert switches(model) == before


def test_other_calls_and_other_layers_are_left_to_torch() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *_: object, **__: object) -> str:  # type: ignore[override]
            return "own"

    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y = torch.randn(2, 3, 4, 8)
    model = nn.ModuleList([layer, Own(8, 2)])
    padding = torch.tensor([[False, False, False, True]] * 3)
    calls = [
        ((x, y, y), {"need_weights": False}),
        ((x, x, x), {"need_weights": True}),
        ((x, x, x), {"need_weights": False, "key_padding_mask": padding}),
        ((x, x, x), {"need_weights": False, "attn_mask": torch.eye(4, dtype=torch.bool)}),
    ]
    for of, options in calls:
        expected = layer(*of, **options)
        with replace_attention(model, products=True), patch.object(BatchedAttention, "apply") as product:
            found = model[0](*of, **options)
            assert model[1](x, x, x) == "own"
        product.assert_not_called()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("precision", "device", "replaced"),
    [("bfloat16", "cpu", True), ("float32", "cpu", False), ("bfloat16", "meta", False)],
)
def test_only_bfloat16_on_a_processor_uses_it(precision: str, device: str, replaced: bool) -> None:
    model = tiny_clip()
    before = switches(model)
    with training_attention(model, precision, torch.device(device)):
        assert (switches(model) != before) is replaced
