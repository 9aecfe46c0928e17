"""What differential privacy costs: a private step against a plain one, and accuracy against epsilon.

    python -m bench.dp --json out/dp.json
    python -m bench.dp --data DIR --out out/dp --json out/dp.json

The step: CLIP ViT-B/16 with random weights, batch 32, 8 classes, as in bench/step.py. A plain and a private
step of both towers, and of the image tower alone, are made in turns in one process. Beside them stands Opacus
(if it is installed) on the published form of the image tower, in which each vector of singular values is a
module of its own, the best case for it. Opacus cannot separate prompts that examples share, so it has no
figure for both towers.

The accuracy (with --data, a folder that holds `wbc_labs.parquet`): the study on white cells at several
epsilons, as real runs by `flwr run`; finished runs under --out are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import step as plain_step
from fedsigma.common.config.constants import PARTS
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.privacy.accounting import calibrate_noise_multiplier, sampling_rate
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import ClipClassifier, autocast
from fedsigma.common.training.dp_sgd import DPSGDGradient
from fedsigma.common.training.loop import GradientStep, batch_gradient
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.simulate import run_simulation

STUDY, ALL, SECOND_SMALLEST, DELTA = "white-cells-four-labs", 125, 149, 1e-5
# Fields of training and federation, and the clipping norm, by level. A round's change is about 5 long.
Fields = dict[str, Any]
IMAGES: tuple[Fields, Fields, float] = ({"learning_rate": 0.02, "batch_size": 64}, {"rounds": 20}, 1.0)
RECIPES = {"none": IMAGES, "image": IMAGES, "site": ({}, {"rounds": 20}, 5.0)}
POINTS = (("none", 0.0), ("image", 8.0), ("image", 2.0), ("image", 0.5), ("site", 8.0), ("site", 1000.0))
PRIVACY = PrivacyConfig(level="image", noise_multiplier=1.0, clip_norm=1.0)


@dataclass(frozen=True)
class Picture:
    """What training needs of an example."""

    image: Tensor
    label: int


class Scale(nn.Module):
    """The vector of singular values of the published form, as a module of its own."""

    def __init__(self, s: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(s.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., k)."""
        return x * self.s


class ScaledLinear(nn.Module):
    """y = U (s * (V^T x)) + b, with s in a module of its own and the rest frozen."""

    def __init__(self, plain: plain_step.FactoredLinear) -> None:
        super().__init__()
        self.register_buffer("u", plain.u.detach())
        self.register_buffer("vh", plain.vh.detach())
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach())
        self.scale = Scale(plain.s)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., columns) to (..., rows)."""
        return F.linear(self.scale(F.linear(x, self.vh)), self.u, self.bias)


def pictures(count: int) -> list[Picture]:
    """The batch of bench/step.py as examples."""
    images, labels = plain_step.batch(count)
    return [Picture(image, int(label)) for image, label in zip(images, labels, strict=True)]


def steps(size: int, precision: str, towers: tuple[str, ...]) -> dict[str, plain_step.Step]:
    """A plain and a private step of a model of their own each, noise and optimiser included."""
    recipe = TrainingConfig(batch_size=size, augment="none", precision=precision)
    found = {}
    for form in ("plain", "private"):
        model, _ = plain_step.build()
        sigma = SigmaModel.adapt(model, SigmaConfig(towers=towers))
        task = ClipClassifier(plain_step.backbone(model), sigma, plain_step.PROMPTS, device="cpu")
        examples = pictures(size)
        # With as many examples as the batch has on average, each is taken in every step.
        gradient: GradientStep = (
            batch_gradient(task, examples, recipe, seed=1)
            if form == "plain"
            else DPSGDGradient(task, examples, recipe, PRIVACY)
        )
        found[form] = plain_step.stepper(sigma.parameters(), lambda *_, g=gradient: g())
    return found


def opacus_step(size: int, precision: str) -> plain_step.Step | None:
    """A step of Opacus on the published form of the image tower; None if it is not installed."""
    try:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError:
        return None
    model = plain_step.papers_form(*plain_step.build())
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
    """Seconds of the steps, and the private one over the plain one."""
    forms: dict[str, plain_step.Step] = dict(steps(size, precision, ("image", "text")))
    image = steps(size, precision, ("image",))
    forms |= {f"image tower, {name}": made for name, made in image.items()}
    if (opacus := opacus_step(size, precision)) is not None:
        forms["image tower, Opacus"] = opacus
    _, seconds = plain_step.alternating(forms, size, rounds)
    for name, value in seconds.items():
        print(f"{name:<24} {value:8.2f} s a step")
    found = {
        "dp_step_ratio": seconds["private"] / seconds["plain"],
        "dp_step_ratio_image": seconds["image tower, private"] / seconds["image tower, plain"],
    }
    if opacus is not None:
        found["opacus_step_ratio_image"] = seconds["image tower, Opacus"] / seconds["image tower, plain"]
    for name, value in found.items():
        print(f"{name:<24} {value:8.2f}")
    return found


def private_study(level: str, target: float, parts: tuple[str, ...]) -> StudyConfig:
    """The study on white cells with every labelled image, hidden at this level within epsilon `target`.

    The noise is such that a site of 149 images, the second smallest, has spent all after the last round; the
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


def run(level: str, target: float, parts: tuple[str, ...], seed: int, out: Path) -> dict[str, float]:
    """Accuracy and balanced accuracy of one run, over all test images; made now unless it was before."""
    folder = out / f"{level}-{target:g}-{'-'.join(parts)}-s{seed}"
    file = folder.with_suffix(".yaml")
    if not (folder / "summary.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(private_study(level, target, parts).to_yaml(), encoding="utf-8")
        code = run_simulation(str(file), out=folder, seed=seed, resume=(folder / "study.yaml").exists())
        if code:
            raise SystemExit(f"level {level}, epsilon {target:g}, seed {seed}: ended with code {code}")
    return dict(RunDir.open(folder).read_summary()["federated"]["confusion"]["metrics"])


def compare_accuracy(seeds: list[int], parts: tuple[str, ...], out: Path) -> list[dict[str, Any]]:
    """Accuracies by level and epsilon; of hidden sites with the first seed only.

    Balanced accuracy stands beside accuracy, for noise lets the commonest class be learned first.
    """
    rows = []
    print(f"{'level':<7}{'epsilon':>8}{'noise':>8}{'accuracy':>10}{'balanced':>10}  seeds")
    for level, target in POINTS:
        found = [run(level, target, parts, s, out) for s in (seeds[:1] if level == "site" else seeds)]
        privacy = private_study(level, target, parts).privacy
        hidden = level != "none"
        rows.append(
            {
                "level": level,
                "epsilon": target if hidden else None,
                "noise_multiplier": privacy.noise_multiplier if hidden else None,
                "accuracy": statistics.mean(one["accuracy"] for one in found),
                "balanced_accuracy": statistics.mean(one["balanced_accuracy"] for one in found),
                "seeds": [one["accuracy"] for one in found],
            }
        )
        words = (f"{target:>8g}{privacy.noise_multiplier:>8g}") if hidden else f"{'-':>8}{'-':>8}"
        each = ", ".join(f"{100 * value:.1f}" for value in rows[-1]["seeds"])
        means = (100 * rows[-1]["accuracy"], 100 * rows[-1]["balanced_accuracy"])
        print(f"{level:<7}{words}{means[0]:>10.1f}{means[1]:>10.1f}  {each}")
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=3, help="timed steps of each form")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    p.add_argument("--data", type=Path, help="folder of wbc_labs.parquet: also compare accuracies")
    p.add_argument("--out", type=Path, default=Path("out/dp"), help="where the runs go")
    p.add_argument("--seeds", type=int, nargs="+", default=[1])
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="adapted parts")
    p.add_argument("--skip-steps", action="store_true", help="compare accuracies only")
    p.add_argument("--json", type=Path)
    return p.parse_args()


def main() -> None:
    """Print the tables."""
    a = arguments()
    found: dict[str, Any] = {} if a.skip_steps else dict(compare_steps(a.batch, a.rounds, a.precision))
    if a.data:
        os.environ["FEDSIGMA_DATA"] = str(a.data.resolve())
        found["study"] = compare_accuracy(a.seeds, tuple(a.parts), a.out.resolve())
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
