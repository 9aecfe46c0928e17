"""What the starter is worth: zero-shot on every set, and few-shot adaptation against random weights.

    python -m tools.starter.figures OUT --data DIR

Run it from the project's folder. OUT/starter.safetensors is what `tools/pretrain_starter.py` wrote; DIR
holds the folders `pretrain` and `eval`. Writes OUT/figures.json, which `tools.starter.package` puts into
the model card. The sets in `eval` were never shown in pre-training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from fedsigma.common.backbones import Backbone, build_model
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.data.loading import load_examples
from fedsigma.common.data.records import Source
from fedsigma.common.data.sampling import few_shot
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.loop import evaluate, train
from fedsigma.common.training.metrics import compute_metrics
from tools.starter.package import load_trained

SHOTS = 16


def task_for(backbone: Backbone, source: Source, cache: Path) -> tuple[ClipClassifier, list[str]]:
    """An adapter at zero shift, and the source's classes."""
    classes = sorted({r.label for r in source.records if r.label})
    sigma = SigmaModel.adapt(backbone.model, cache_dir=cache)
    return ClipClassifier(backbone, sigma, [f"a photo of a {c}." for c in classes]), classes


def accuracy(task: ClipClassifier, source: Source, classes: list[str]) -> float:
    """On the test part."""
    test = [r for r in source.records if r.split == "test"]
    return (
        compute_metrics(evaluate(task, load_examples(source, test, classes, side=task.image_size))).accuracy
        or 0.0
    )


def adapted(task: ClipClassifier, source: Source, classes: list[str], steps: int) -> float:
    """Test accuracy after training on SHOTS images a class and site, all in one place."""
    sites = {r.site for r in source.records}
    chosen = [
        record
        for site in sorted(sites, key=str)
        for record in few_shot(
            [r for r in source.records if r.site == site], shots=SHOTS, classes=classes, seed=1
        )
    ]
    examples = load_examples(source, chosen, classes, side=task.image_size * 3 // 2)
    recipe = TrainingConfig(learning_rate=0.04, batch_size=16, augment="microscopy")  # as in the studies
    train(task, examples, recipe, steps=steps, total_steps=steps, seed=1, progress=True)
    return accuracy(task, source, classes)


def main() -> None:
    """Measure, print, and write figures.json."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--steps", type=int, default=200)
    a = p.parse_args()
    seen: dict[str, float] = {}
    held: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)

        def fresh(trained: bool) -> Backbone:
            backbone = load_trained(a.out / "starter.safetensors")
            if trained:
                return backbone
            torch.manual_seed(0)
            model = build_model(backbone.model_cfg).eval().requires_grad_(False)
            return replace(backbone, model=model)

        for file in sorted((a.data / "pretrain").glob("*.parquet")):
            source = open_source(f"parquet:{file.resolve()}")
            seen[file.stem] = round(accuracy(*_with(fresh(True), source, cache)), 4)
            print(file.stem, seen[file.stem], flush=True)
        for file in sorted((a.data / "eval").glob("*.parquet")):
            source = open_source(f"parquet:{file.resolve()}")
            row = {"zero-shot": accuracy(*_with(fresh(True), source, cache))}
            for title, trained in (("adapted", True), ("random weights, adapted", False)):
                task, classes = task_for(fresh(trained), source, cache)
                row[title] = adapted(task, source, classes, a.steps)
            held[file.stem] = {name: round(value, 4) for name, value in row.items()}
            print(file.stem, held[file.stem], flush=True)
    budget = f"{a.steps} steps on {SHOTS} images a class and site"
    figures = {
        "Zero-shot accuracy on the test parts of its own sets": seen,
        f"Sets it never saw: accuracy zero-shot and after {budget}": held,
    }
    (a.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def _with(backbone: Backbone, source: Source, cache: Path) -> tuple[ClipClassifier, Source, list[str]]:
    task, classes = task_for(backbone, source, cache)
    return task, source, classes


if __name__ == "__main__":
    main()
