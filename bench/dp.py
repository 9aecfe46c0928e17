"""The cost of differential privacy: a private step against a plain one, and accuracy against epsilon.

    python -m bench.dp --json out/dp.json
    python -m bench.dp --data DIR --out out/dp --json out/dp.json

The step: CLIP ViT-B/16 with random weights, batch 32, 8 classes, as in bench/step.py. A plain and a private
step of both towers, and of the image tower alone, are made in turns in one process. Beside them Opacus (if
installed) on the published form of the image tower, in which each vector of singular values is a module, the
best case for it. Opacus cannot separate prompts that examples share, so it has no figure for both towers.

The accuracy (with --data): the study on white cells at several epsilons, by `flwr run`.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import step as plain_step
from bench.harness import DATA_HELP, Table, argument_parser, parse_arguments, write_json
from bench.runs import run_study
from fedsigma.common.config.constants import PARTS
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.data.loading import Example
from fedsigma.common.privacy.accounting import calibrate_noise_multiplier, sampling_rate
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import ClipClassifier, autocast
from fedsigma.common.training.dp_sgd import DPSGDGradient
from fedsigma.common.training.loop import GradientStep, batch_gradient

STUDY, ALL, SECOND_SMALLEST, DELTA = "white-cells-four-labs", 125, 149, 1e-5
Fields = dict[str, Any]
IMAGES: tuple[Fields, Fields, float] = ({"learning_rate": 0.02, "batch_size": 64}, {"rounds": 20}, 1.0)
RECIPES = {"none": IMAGES, "image": IMAGES, "site": ({}, {"rounds": 20}, 5.0)}
"""Fields of training and federation, and the clipping norm, by level. The norm of an update is about 5."""
POINTS = (("none", 0.0), ("image", 8.0), ("image", 2.0), ("image", 0.5), ("site", 8.0), ("site", 1000.0))
PRIVACY = PrivacyConfig(level="image", noise_multiplier=1.0, clip_norm=1.0)


class Scale(nn.Module):
    """The vector of singular values of the published form, as a module."""

    def __init__(self, s: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(s.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., k)."""
        return x * self.s


class ScaledLinear(nn.Module):
    """y = U (s * (V^T x)) + b, with s in a module and the rest frozen."""

    def __init__(self, plain: plain_step.FactoredLinear) -> None:
        super().__init__()
        self.register_buffer("u", plain.u.detach())
        self.register_buffer("vh", plain.vh.detach())
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach())
        self.scale = Scale(plain.s)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., columns) to (..., rows)."""
        return F.linear(self.scale(F.linear(x, self.vh)), self.u, self.bias)


def examples(count: int) -> list[Example]:
    """Return the batch of bench/step.py as examples."""
    images, labels = plain_step.batch(count)
    return [Example(image, int(label), None) for image, label in zip(images, labels, strict=True)]


def steps(size: int, precision: str, towers: tuple[str, ...]) -> dict[str, plain_step.Step]:
    """Return a plain and a private step, each of its own model, with noise and optimiser."""
    recipe = TrainingConfig(batch_size=size, augment="none", precision=precision)
    forms = {}
    for form in ("plain", "private"):
        model, _ = plain_step.build()
        sigma = SigmaModel.adapt(model, SigmaConfig(towers=towers))
        task = ClipClassifier(plain_step.backbone(model), sigma, plain_step.PROMPTS, device="cpu")
        batch = examples(size)
        # With as many examples as the batch has on average, each is in every step.
        gradient: GradientStep = (
            batch_gradient(task, batch, recipe, seed=1)
            if form == "plain"
            else DPSGDGradient(task, batch, recipe, PRIVACY)
        )
        forms[form] = plain_step.stepper([sigma.shift], lambda *_, g=gradient: g())
    return forms


def opacus_step(size: int, precision: str) -> plain_step.Step | None:
    """Return a step of Opacus on the published form of the image tower; None if it is not installed."""
    try:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError:
        return None
    model = plain_step.published_form(*plain_step.build())
    model.requires_grad_(False)
    for module in list(model.visual.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, plain_step.FactoredLinear):
                setattr(module, name, ScaledLinear(child))
    with torch.no_grad():
        text = plain_step.PromptEncoder(plain_step.backbone(model), plain_step.PROMPTS).features()
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (plain_step.OPENAI_DATASET_MEAN, plain_step.OPENAI_DATASET_STD)
    )
    tower = GradSampleModule(model.visual, batch_first=True, loss_reduction="mean", strict=False)
    trained = [p for p in tower.parameters() if p.requires_grad]
    optimiser = DPOptimizer(
        torch.optim.AdamW(trained, lr=1e-4),
        noise_multiplier=PRIVACY.noise_multiplier,
        max_grad_norm=PRIVACY.clip_norm,
        expected_batch_size=size,
    )

    def step(images: Tensor, labels: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        with autocast(precision, torch.device("cpu")):
            features = F.normalize(tower((images.float() / 255 - mean) / std).float(), dim=-1)
        loss = F.cross_entropy(plain_step.LOGIT_SCALE * features @ text.T, labels)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def compare_steps(size: int, rounds: int, precision: str) -> dict[str, float]:
    """Print and return the seconds of the steps, and the ratios of private to plain ones."""
    forms: dict[str, plain_step.Step] = dict(steps(size, precision, ("image", "text")))
    image = steps(size, precision, ("image",))
    forms |= {f"image tower, {name}": step for name, step in image.items()}
    if (opacus := opacus_step(size, precision)) is not None:
        forms["image tower, Opacus"] = opacus
    _, seconds = plain_step.alternating(forms, size, rounds)
    figures = {
        "dp_step_ratio": seconds["private"] / seconds["plain"],
        "dp_step_ratio_image": seconds["image tower, private"] / seconds["image tower, plain"],
    }
    if opacus is not None:
        figures["opacus_step_ratio_image"] = seconds["image tower, Opacus"] / seconds["image tower, plain"]
    table = Table({"form or ratio": "<24", "s a step": ">8.2f"})
    table.rows((seconds | figures).items())
    return figures


def private_study(level: str, target: float, parts: tuple[str, ...]) -> StudyConfig:
    """Return the study on white cells with every labelled image, private at this level within epsilon
    `target`.

    The noise exhausts the budget of a site of 149 images, the second smallest, in the last round; the
    smallest (47 images) ends earlier. Recipe and norms were chosen on validation images from the training
    parts.
    """
    study = load_study(STUDY)
    study = replace(study, shots=ALL, baselines=(), sigma=replace(study.sigma, parts=parts))
    training, federation, clip = RECIPES[level]
    study = replace(
        study,
        training=replace(study.training, **training),
        federation=replace(study.federation, **federation, evaluate_every=federation["rounds"]),
    )
    if level == "none":
        return study
    steps, rounds = study.training.local_steps, study.federation.rounds
    rate = 1.0 if level == "site" else sampling_rate(SECOND_SMALLEST, study.training.batch_size)
    noise = calibrate_noise_multiplier(
        target, delta=DELTA, rate=rate, steps=rounds * (1 if level == "site" else steps)
    )
    return replace(
        study,
        privacy=PrivacyConfig(
            level=level, noise_multiplier=noise, clip_norm=clip, delta=DELTA, epsilon=target
        ),
    )


def compare_accuracy(seeds: list[int], parts: tuple[str, ...], out: Path) -> list[dict[str, Any]]:
    """Print and return accuracies by level and epsilon; at level `site` with the first seed only.

    Balanced accuracy stands beside accuracy, since with noise the commonest class is learned first.
    """
    rows = []
    for level, target in POINTS:
        study, runs = private_study(level, target, parts), []
        for seed in seeds[:1] if level == "site" else seeds:
            folder = out / f"{level}-{target:g}-{'-'.join(parts)}-s{seed}"
            runs.append(run_study(study, folder, seed=seed)["federated"]["confusion"]["metrics"])
        private = level != "none"
        rows.append(
            {
                "level": level,
                "epsilon": target if private else None,
                "noise_multiplier": study.privacy.noise_multiplier if private else None,
                "accuracy": statistics.mean(run["accuracy"] for run in runs),
                "balanced_accuracy": statistics.mean(run["balanced_accuracy"] for run in runs),
                "seeds": [run["accuracy"] for run in runs],
            }
        )
    columns = {"level": "<6", "epsilon": ">8g", "noise": ">7g", "accuracy": ">9.1f", "balanced": ">9.1f"}
    table = Table(columns | {" seeds": "<"})
    for row in rows:
        accuracies = 100 * row["accuracy"], 100 * row["balanced_accuracy"]
        text = " " + ", ".join(f"{100 * value:.1f}" for value in row["seeds"])
        table.row(row["level"], row["epsilon"], row["noise_multiplier"], *accuracies, text)
    return rows


def main() -> None:
    """Measure and print the tables."""
    data = f"{DATA_HELP}: also compare accuracies"
    p = argument_parser(
        __doc__, data=data, out="out/dp", seeds=(1,), rounds=3, rounds_help="timed steps of each form"
    )
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="adapted parts")
    p.add_argument("--skip-steps", action="store_true", help="compare accuracies only")
    options = parse_arguments(p)
    figures: dict[str, Any] = {}
    if not options.skip_steps:
        figures |= compare_steps(options.batch, options.rounds, options.precision)
    if options.data:
        figures["study"] = compare_accuracy(options.seeds, tuple(options.parts), options.out)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
