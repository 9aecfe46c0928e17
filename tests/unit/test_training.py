"""Local training and evaluation on a tiny backbone with random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsigma.common.backbones import Backbone
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.augment import BUILDERS
from fedsigma.common.training.classifier import ClipClassifier, TrainingError, autocast, resize_image
from fedsigma.common.training.loop import accumulate_gradient, evaluate, train
from fedsigma.common.training.prompts import PromptEncoder, l2_normalize
from tests.helpers.tiny import timm_clip, tiny_clip

PROMPTS = ("a photo of a red one.", "a photo of a green one.", "a photo of a blue one, seen from far.")


@dataclass(frozen=True)
class Picture:
    image: Tensor
    label: int


def tokenize(texts: list[str]) -> Tensor:
    """One token a word, 63 at the end, zeros behind: the form of CLIP's own tokenizer."""
    rows = torch.zeros(len(texts), 16, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        numbers = [1 + sum(map(ord, word)) % 60 for word in text.split()]
        row[: len(numbers) + 1] = torch.tensor([*numbers, 63])
    return rows


def backbone(model: nn.Module | None = None, **changes: object) -> Backbone:
    values = {
        "name": "tiny",
        "model": model or tiny_clip(),
        "tokenizer": tokenize,
        "image_size": 32,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interpolation": "bicubic",
        "logit_scale": 20.0,
    }
    return Backbone(**{**values, **changes})


def task(tmp_path: Path, **selection: object) -> ClipClassifier:
    loaded = backbone()
    sigma = SigmaModel.adapt(loaded.model, SigmaConfig(**selection), cache_dir=tmp_path)
    return ClipClassifier(loaded, sigma, PROMPTS, device="cpu")


def coloured(count: int, seed: int = 0, side: int = 40) -> list[Picture]:
    """Noisy pictures whose class is their strongest channel."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for number in range(count):
        image = torch.randint(0, 120, (3, side, side + 6), generator=generator, dtype=torch.uint8)
        image[number % 3] += 120
        pictures.append(Picture(image, number % 3))
    return pictures


RECIPE = TrainingConfig(learning_rate=0.03, batch_size=8, augment="gentle")


def run(
    job: ClipClassifier,
    examples: list[Picture],
    recipe: TrainingConfig = RECIPE,
    steps: int = 10,
    **more: int,
) -> float:
    settings_ = {"steps": steps, "total_steps": steps, "seed": 1, **more}
    return train(job, examples, recipe, **settings_)


def test_training_learns_and_lowers_the_loss(tmp_path: Path) -> None:
    job, examples = task(tmp_path), coloured(24)
    before = evaluate(job, coloured(30, seed=9))
    first, last = run(job, examples, steps=1), run(job, examples, steps=40)
    after = evaluate(job, coloured(30, seed=9))
    assert last < 0.7 * first

    def right(p: object) -> float:
        return (p.probabilities.argmax(1) == p.labels).float().mean().item()

    assert right(after) > right(before) + 0.2


def test_same_seed_same_shift_other_seed_other_shift(tmp_path: Path) -> None:
    shifts = []
    for seed in (1, 1, 2):
        job = task(tmp_path)
        run(job, coloured(12), steps=3, seed=seed)
        shifts.append(job.sigma.get_shift())
    assert torch.equal(shifts[0], shifts[1]) and not torch.equal(shifts[0], shifts[2])


def test_training_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    job = task(tmp_path)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run(job, coloured(6), steps=2)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("count", [1, 5, 9])
def test_one_image_missing_classes_and_odd_batches_work(count: int, tmp_path: Path) -> None:
    job = task(tmp_path)
    examples = [Picture(p.image, 2) for p in coloured(count)]
    loss = train(job, examples, RECIPE, steps=3, total_steps=3, seed=0)
    assert math.isfinite(loss)
    assert job.sigma.get_shift().abs().max() > 0


def test_training_without_examples_is_refused(tmp_path: Path) -> None:
    job = task(tmp_path)
    with pytest.raises(TrainingError, match="no training example"):
        run(job, [])


@pytest.mark.parametrize("name", [name for name, build in BUILDERS.items() if build])
def test_augmentation_varies_pictures_of_the_right_shape(name: str) -> None:
    augment = BUILDERS[name](32)
    image = coloured(1)[0].image
    found = [augment(image) for _ in range(8)]
    assert all(x.shape == (3, 32, 32) and x.dtype == torch.uint8 for x in found)
    assert len({x.float().mean().item() for x in found}) > 1
    # Crops and changes of light leave the class visible: the strongest channel stays the strongest.
    assert sum(x.float().mean((1, 2)).argmax().item() == 0 for x in found) >= 7


@pytest.mark.parametrize("rate", [1e9, 1e20])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_that_is_not_finite_is_named(precision: str, rate: float, tmp_path: Path) -> None:
    job = task(tmp_path)
    # At 1e9 in bfloat16 nothing overflows but what the last layer norm turns into zeros.
    recipe = TrainingConfig(batch_size=8, schedule="constant", precision=precision)
    object.__setattr__(recipe, "learning_rate", rate)  # above what a study may have
    with pytest.raises(TrainingError, match="lower the learning rate"):
        run(job, coloured(8), recipe, steps=5)


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(0, 20), st.floats(1e-4, 1))
def test_schedule_runs_over_the_whole_study(total: int, warmup: int, rate: float) -> None:
    recipe = TrainingConfig(learning_rate=rate, warmup_steps=warmup, final_learning_rate=rate / 100)
    rates = [recipe.learning_rate_at(step, total) for step in range(total)]
    assert all(0 < r <= rate * (1 + 1e-9) for r in rates)
    late = rates[warmup:]
    assert all(a >= b for a, b in pairwise(late))
    if total > warmup:
        assert late[0] == pytest.approx(rate)
    assert recipe.learning_rate_at(total, total) >= recipe.final_learning_rate * (1 - 1e-9)


def test_rounds_follow_one_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW, *arguments: object) -> object:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    job = task(tmp_path)
    for start in (0, 4):
        train(job, coloured(4), RECIPE, first_step=start, steps=4, total_steps=8, seed=0)
    assert seen == [RECIPE.learning_rate_at(i, 8) for i in range(8)]


def test_weight_decay_and_proximal_term_pull(tmp_path: Path) -> None:
    def trained(recipe: TrainingConfig, start: float) -> Tensor:
        job = task(tmp_path)
        job.sigma.set_shift(torch.full((job.sigma.layout.size,), start))
        run(job, coloured(6), recipe, steps=20)
        return job.sigma.get_shift()

    free = trained(RECIPE, 0.3)
    assert (
        trained(
            TrainingConfig(learning_rate=0.03, batch_size=8, augment="gentle", weight_decay=5.0), 0.3
        ).norm()
        < 0.8 * free.norm()
    )
    held = trained(TrainingConfig(learning_rate=0.03, batch_size=8, augment="gentle", proximal=100.0), 0.3)
    assert (held - 0.3).norm() < 0.7 * (free - 0.3).norm()


ADJUSTED = {"learning_rate": 0.02, "batch_size": 64, "augment": "none", "precision": "float32"}


def changes_of_two_sites(optimiser: str, tmp_path: Path) -> tuple[Tensor, Tensor]:
    """The mean of two sites' changes in one step, by number of images, and the change on all of these."""
    job, pictures = task(tmp_path), coloured(9)
    recipe = TrainingConfig(**ADJUSTED, optimiser=optimiser)

    def change(examples: list[Picture]) -> Tensor:
        job.sigma.set_shift(torch.zeros(job.sigma.layout.size))
        run(job, examples, recipe, steps=1)
        return job.sigma.get_shift()

    one, other = ([p for p in pictures if (p.label == 0) is own] for own in (True, False))
    return (3 * change(one) + 6 * change(other)) / 9, change(pictures)


def test_the_mean_of_plain_steps_is_the_step_on_all_sites_images(tmp_path: Path) -> None:
    mean, together = changes_of_two_sites("sgd", tmp_path)
    assert together.norm() > 0
    assert (mean - together).norm() < 1e-4 * together.norm()
    # Of AdamW's it is not: each value steps as far at a site, whatever its gradient.
    mean, together = changes_of_two_sites("adamw", tmp_path)
    assert (mean - together).norm() > 0.2 * together.norm()


def test_a_plain_step_is_the_rate_times_the_gradient_all_through_a_study(tmp_path: Path) -> None:
    job, pictures = task(tmp_path), coloured(5)
    recipe = TrainingConfig(
        learning_rate=0.5, batch_size=5, optimiser="sgd", augment="none", precision="float32"
    )
    images, labels = torch.stack([job.resize(p) for p in pictures]), torch.tensor([p.label for p in pictures])
    accumulate_gradient(job, images, labels, precision="float32")
    assert job.sigma.shift.grad is not None
    wanted, job.sigma.shift.grad = -0.5 * job.sigma.shift.grad, None
    train(job, pictures, recipe, first_step=90, steps=1, total_steps=100, seed=1)
    torch.testing.assert_close(job.sigma.get_shift(), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("towers", [("image", "text"), ("image",), ("text",)])
def test_gradient_in_parts_is_that_of_the_batch(
    towers: tuple[str, ...], precision: str, tmp_path: Path
) -> None:
    job = task(tmp_path, towers=towers)
    job.sigma.set_shift(0.05 * torch.randn(job.sigma.layout.size))
    images, labels = torch.stack([job.resize(e) for e in coloured(7)]), torch.arange(7) % 3
    losses, gradients = [], []
    for size in (7, 3, 1):
        job.micro_batch, job.sigma.shift.grad = size, None
        losses.append(accumulate_gradient(job, images, labels, precision=precision))
        gradients.append(job.sigma.shift.grad)
    logits = job.logits(job.image_features(images), job.text_features())  # in float32
    (whole,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits.float(), labels), job.sigma.shift)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2)
    for gradient in gradients:
        # bfloat16 has 8 bits: the whole batch in one pass is off by up to 0.05 here.
        assert (gradient - whole).norm() < (1e-4 if precision == "float32" else 0.1) * whole.norm()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_frozen_tower_is_left_out(tower: str, tmp_path: Path) -> None:
    job = task(tmp_path, towers=(tower,))
    calls = []
    encode = job.backbone.model.encode_text
    job.backbone.model.encode_text = lambda tokens: calls.append(1) or encode(tokens)
    run(job, coloured(6), steps=4)
    assert len(calls) == (1 if tower == "image" else 4)
    assert job.sigma.get_shift().abs().max() > 0


def test_evaluation_counts_every_image_once_and_ignores_order(tmp_path: Path) -> None:
    job, examples = task(tmp_path), coloured(7)
    whole, small = evaluate(job, examples), evaluate(job, examples, batch_size=3)
    torch.testing.assert_close(whole.probabilities, small.probabilities, atol=1e-5, rtol=1e-4)
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    torch.testing.assert_close(whole.probabilities.sum(1), torch.ones(7))
    assert evaluate(job, []).probabilities.shape == (0, 3)


# prompts --------------------------------------------------------------------------------------------


def features(loaded: Backbone, cut: bool) -> tuple[Tensor, int]:
    with torch.no_grad():
        prompts = PromptEncoder(loaded, PROMPTS, cut=cut)
        return prompts.features(), prompts.length


@pytest.mark.parametrize("build", [tiny_clip, timm_clip])
def test_cut_prompts_give_the_same_features(build: object) -> None:
    loaded = backbone(build())
    full, cut = features(loaded, False), features(loaded, True)
    assert (full[1], cut[1]) == (16, 10)
    torch.testing.assert_close(full[0], cut[0], atol=1e-6, rtol=1e-5)
    assert features(loaded, False)[1] == 16  # everything was put back


def test_towers_that_read_padding_are_not_cut() -> None:
    loaded = backbone(timm_clip())
    loaded.model.text.pool_type = "last"
    assert features(loaded, True)[1] == 16


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(3, 40, 20), (3, 20, 41), (3, 32, 32)])
def test_fit_gives_a_square(mode: str, shape: tuple[int, int, int]) -> None:
    image = torch.full(shape, 200, dtype=torch.uint8)
    fitted = resize_image(image, backbone(resize_mode=mode))
    assert fitted.shape == (3, 32, 32) and fitted.dtype == torch.uint8
    bars = mode == "longest" and shape[1] != shape[2]
    assert bool((fitted == 0).any()) == bars


def test_logits_are_float32_also_under_autocast(tmp_path: Path) -> None:
    job = task(tmp_path)
    image, text = torch.randn(2, 3, 24).unbind()
    with autocast("bfloat16", job.device):
        logits = job.logits(image, text)
    assert torch.equal(logits, job.logits(image, text)) and logits.dtype == torch.float32


def test_features_without_a_direction_are_not_numbers() -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e30, 1e30]])
    np.testing.assert_allclose(l2_normalize(features), [[0.6, 0.8], [np.nan] * 2, [np.nan] * 2])


def test_a_diverged_model_gives_no_predictions(tmp_path: Path) -> None:
    job = task(tmp_path)
    job.sigma.set_shift(torch.full((job.sigma.layout.size,), 1e25))
    with pytest.raises(TrainingError, match=r"diverged \(largest value 1e\+25\)"):
        evaluate(job, coloured(5))
