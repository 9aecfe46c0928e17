"""Differentially private training: gradients of each example, clipping, noise, samples, groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.privacy.noise import SecureRandom
from fedsigma.common.sigma import PerSampleUnsupported, SigmaModel
from fedsigma.common.training import dp_sgd
from fedsigma.common.training.classifier import ClipClassifier, TrainingError, resize_image
from fedsigma.common.training.dp_sgd import (
    DPSGDGradient,
    clipped_sum,
    per_sample_gradients,
    sequential_gradients,
    supports_per_sample_gradients,
)
from fedsigma.common.training.loop import train
from tests.helpers.tiny import timm_clip, tiny_clip
from tests.unit.test_training import PROMPTS, backbone, coloured, task

RECIPE = TrainingConfig(learning_rate=0.03, batch_size=6, augment="none", precision="float32")
IMAGE = PrivacyConfig(level="image", noise_multiplier=1.0, clip_norm=0.5)


@dataclass(frozen=True)
class Grouped:
    image: Tensor
    label: int
    group: str | None


def batch(job: ClipClassifier, count: int = 5) -> tuple[Tensor, Tensor]:
    examples = coloured(count)
    images = torch.stack([resize_image(e.image, job.backbone) for e in examples])
    return images, torch.tensor([e.label for e in examples])


def adapted(model: nn.Module, tmp_path: Path, side: int, **selection: object) -> ClipClassifier:
    loaded = backbone(model, image_size=side)
    sigma = SigmaModel.adapt(loaded.model, SigmaConfig(**selection), cache_dir=tmp_path)
    job = ClipClassifier(loaded, sigma, PROMPTS, device="cpu", micro_batch=2)
    job.sigma.set_shift(0.1 * torch.randn(job.sigma.layout.size, generator=torch.Generator().manual_seed(1)))
    return job


def one_by_one(job: ClipClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """The gradients by the plainest way there is: the adapted model, one example, autograd."""
    found = []
    for image, label in zip(images, labels, strict=True):
        logits = job.logits(job.image_features(image[None]), job.text_features())
        loss = F.cross_entropy(logits, label[None])
        found.append(torch.autograd.grad(loss, job.sigma.shift)[0])
    return torch.stack(found)


MODELS = {
    "open_clip": (lambda: tiny_clip(), 32, {}),
    "timm": (lambda: timm_clip(), 160, {}),
    "cross-covariance": (lambda: timm_clip("xcit_nano_12_p16_224"), 160, {"layers": (0, 11)}),
    "image tower": (lambda: tiny_clip(), 32, {"towers": ("image",)}),
    "text tower": (lambda: tiny_clip(), 32, {"towers": ("text",)}),
    "part of a packed weight": (lambda: tiny_clip(), 32, {"parts": ("v",)}),
    "mlp": (lambda: tiny_clip(), 32, {"parts": ("mlp",), "layers": (1,)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_examples_gradient_is_that_of_the_loop(name: str, tmp_path: Path) -> None:
    build, side, selection = MODELS[name]
    job = adapted(build(), tmp_path, side, **selection)
    images, labels = batch(job)
    expected = one_by_one(job, images, labels)
    assert supports_per_sample_gradients(job, precision="float32")
    fast = torch.cat(list(per_sample_gradients(job, images, labels, precision="float32")))
    slow = torch.cat(list(sequential_gradients(job, images, labels, precision="float32")))
    assert (expected.norm(dim=1) > 1e-3).all()
    assert torch.allclose(fast, expected, atol=2e-5 * expected.abs().max().item(), rtol=1e-3)
    assert torch.allclose(slow, expected, atol=2e-5 * expected.abs().max().item(), rtol=1e-3)


def test_bfloat16_is_as_near_as_it_can_be(tmp_path: Path) -> None:
    job = adapted(tiny_clip(), tmp_path, 32)
    images, labels = batch(job)
    expected = one_by_one(job, images, labels)
    fast = torch.cat(list(per_sample_gradients(job, images, labels, precision="bfloat16")))
    assert ((fast - expected).norm(dim=1) < 0.05 * expected.norm(dim=1)).all()


def test_the_model_is_as_before_afterwards(tmp_path: Path) -> None:
    job = adapted(tiny_clip(), tmp_path, 32)
    images, labels = batch(job)
    before = one_by_one(job, images, labels)
    with pytest.raises(KeyError), job.sigma.per_sample_gradients():
        raise KeyError
    list(per_sample_gradients(job, images, labels, precision="float32"))
    assert torch.equal(one_by_one(job, images, labels), before)


def test_a_model_that_cannot_be_separated_takes_the_loop(tmp_path: Path) -> None:
    job = adapted(tiny_clip(), tmp_path, 32)
    block = job.backbone.model.visual.transformer.resblocks[0].attn

    def own_way(query: Tensor, key: Tensor, value: Tensor, **options: object) -> tuple[Tensor, None]:
        options.pop("need_weights", None)
        found, _ = nn.MultiheadAttention.forward(block, query, key, value, need_weights=True, **options)
        return found, None

    class Own(nn.MultiheadAttention):
        forward = lambda self, q, k, v, **options: own_way(q, k, v, **options)  # noqa: E731

    block.__class__ = type("Own", (block.__class__,), {"forward": Own.forward})
    images, labels = batch(job)
    with pytest.raises(PerSampleUnsupported, match="mixes the examples"):
        list(per_sample_gradients(job, images, labels, precision="float32"))
    assert not supports_per_sample_gradients(job, precision="float32")
    gradient = DPSGDGradient(job, coloured(5), RECIPE, IMAGE)
    assert gradient._gradients is sequential_gradients


def test_layer_that_mixes_examples_is_detected(tmp_path: Path) -> None:
    """Tokens first and examples second: the first dimension divides by luck, and the result is wrong."""
    job = adapted(tiny_clip(), tmp_path, 32, parts=("mlp",))
    for block in job.backbone.model.transformer.resblocks:
        inner = block.mlp.forward
        block.mlp.forward = lambda x, inner=inner: inner(x.transpose(0, 1).contiguous()).transpose(0, 1)
    assert not supports_per_sample_gradients(job, precision="float32")


def test_clipping_shortens_and_never_lengthens() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(clipped_sum(rows, 1.0), torch.tensor([0.6 + 0.3, 0.8 + 0.4]))
    assert torch.allclose(clipped_sum(rows[:1], 10.0), rows[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_gradient_that_is_not_finite_adds_nothing(bad: float) -> None:
    rows = torch.tensor([[bad, bad], [0.3, 0.4]])
    found = clipped_sum(rows, 1.0)
    assert torch.allclose(found, torch.tensor([0.3, 0.4]))


def steps(
    job: ClipClassifier, examples: list, recipe: TrainingConfig, privacy: PrivacyConfig, count: int
) -> Tensor:
    gradient, found = DPSGDGradient(job, examples, recipe, privacy), []
    for _ in range(count):
        gradient()
        found.append(job.sigma.shift.grad.clone())
    return torch.stack(found)


def test_noise_has_the_variance_that_was_asked_for(tmp_path: Path) -> None:
    """All images are taken in every step, so that nothing but the noise differs between steps."""
    job = task(tmp_path)
    privacy = PrivacyConfig(level="image", noise_multiplier=2.0, clip_norm=0.5)
    examples = coloured(4)
    found = steps(
        job, examples, TrainingConfig(batch_size=4, augment="none", precision="float32"), privacy, 30
    )
    expected = (2.0 * 0.5 / 4) ** 2
    count = found.numel()
    # The sample variance of n normal numbers scatters by sqrt(2/n) of itself: five times that is allowed.
    assert abs(found.var(0).mean().item() / expected - 1) < 5 * math.sqrt(2 / count)


def test_without_noise_it_is_the_clipped_mean(tmp_path: Path) -> None:
    job = adapted(tiny_clip(), tmp_path, 32)
    examples = coloured(5)
    images, labels = batch(job, 5)
    each = one_by_one(job, images, labels)
    norm = float(each.norm(dim=1).median())
    privacy = PrivacyConfig(level="image", noise_multiplier=1e-3, clip_norm=norm)
    with patch.object(SecureRandom, "normal", lambda self, count: np.zeros(count)):
        found = steps(
            job, examples, TrainingConfig(batch_size=5, augment="none", precision="float32"), privacy, 1
        )[0]
    expected = sum(g * min(1.0, norm / g.norm().item()) for g in each) / 5
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
def test_a_group_adds_no_more_than_the_norm(micro_batch: int, tmp_path: Path) -> None:
    """The sum over groups of their clipped mean gradients, however they fall into micro-batches."""
    job = adapted(tiny_clip(), tmp_path, 32)
    job.micro_batch = micro_batch
    names = ["a", "b", "a", "a", "c", "a", "b"]
    plain = coloured(7)
    examples = [Grouped(e.image, e.label, name) for e, name in zip(plain, names, strict=True)]
    images, labels = batch(job, 7)
    each = one_by_one(job, images, labels)
    means = [each[[i for i, n in enumerate(names) if n == name]].mean(0) for name in "abc"]
    norm = sorted(float(m.norm()) for m in means)[1]
    privacy = PrivacyConfig(level="group", noise_multiplier=1e-3, clip_norm=norm)
    with patch.object(SecureRandom, "normal", lambda self, count: np.zeros(count)):
        found = steps(
            job, examples, TrainingConfig(batch_size=7, augment="none", precision="float32"), privacy, 1
        )[0]
    expected = sum(m * min(1.0, norm / m.norm().item()) for m in means) / 3
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


def test_a_picture_without_a_group_cannot_be_hidden_as_one(tmp_path: Path) -> None:
    examples = [Grouped(e.image, e.label, None) for e in coloured(3)]
    with pytest.raises(TrainingError, match="has no group"):
        DPSGDGradient(task(tmp_path), examples, RECIPE, PrivacyConfig(level="group"))


def test_one_image_more_or_less_moves_the_sum_by_the_norm_at_most(tmp_path: Path) -> None:
    """The sensitivity, with an image made to have a large gradient."""
    job = adapted(tiny_clip(), tmp_path, 32)
    gradient = DPSGDGradient(job, coloured(5), RECIPE, IMAGE)
    with_it, without = gradient._sum([[i] for i in range(5)]), gradient._sum([[i] for i in range(4)])
    images, labels = batch(job, 5)
    assert one_by_one(job, images, labels)[4].norm() > 2 * IMAGE.clip_norm
    assert (with_it - without).norm().item() == pytest.approx(IMAGE.clip_norm, rel=1e-3)


def test_an_empty_sample_is_noise_alone(tmp_path: Path) -> None:
    job = task(tmp_path)
    gradient = DPSGDGradient(job, coloured(5), RECIPE, IMAGE)
    with patch.object(SecureRandom, "sample", lambda self, count, rate: []):
        assert math.isnan(gradient())
    assert job.sigma.shift.grad.std().item() == pytest.approx(1.0 * 0.5 / 5, rel=0.1)


def test_two_calls_with_one_seed_differ(tmp_path: Path) -> None:
    """A server knows the seed: from noise that follows from it, it could be taken off."""
    job, examples = task(tmp_path), coloured(6)
    found = []
    for _ in range(2):
        job.sigma.set_shift(torch.zeros(job.sigma.layout.size))
        gradient = DPSGDGradient(job, examples, RECIPE, IMAGE)
        loss = train(job, examples, RECIPE, steps=2, total_steps=2, seed=1, gradient=gradient)
        found.append(job.sigma.get_shift())
    assert math.isnan(loss)
    assert not torch.equal(*found)


def test_the_log_says_which_way_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with patch.object(dp_sgd, "per_sample_gradients", side_effect=PerSampleUnsupported("of a reason")):
        assert not supports_per_sample_gradients(task(tmp_path))
    assert "of a reason" in caplog.text
