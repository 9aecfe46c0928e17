"""What an upload costs at each coding level: bytes, error and accuracy, beside what other methods send.

    python -m bench.wire --data DIR --out out/wire --json out/wire.json

DIR holds `wbc_labs.parquet` and `ham10000_sites.parquet`. Three measurements:

- bytes and relative error of each level on a real trained change of CLIP ViT-B/16: 92,160 values, trained on
  white cells of one laboratory, two steps a round with the study's recipe. Bytes are those of the whole reply
  that a site sends. The weights are random unless --weights names some (`ViT-B-16/openai`, `local-dir:...`).
- bits a value of the same integers by zstandard, which the coding uses, by constriction's range coder (if
  that is installed) and at their entropy.
- accuracy of the two studies on real images at each level, three seeds, as real runs by `flwr run` without
  baselines. Finished runs under --out are not repeated and interrupted ones are gone on with. accuracy_drop
  is the loss against level exact in points, the mean over the seeds, of the study that loses more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from bench import step
from bench.tune import validation_sites
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.constants import CODECS
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.common.sigma import Layout, SigmaModel
from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.loop import train
from fedsigma.common.training.trainer import derive_seed
from fedsigma.common.wire import quantization
from fedsigma.common.wire.codec import SMALL_STEP, encode_update
from fedsigma.common.wire.records import Evaluation, TrainReply, to_record, wire_bytes
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.simulate import run_simulation

STUDIES = ("white-cells-four-labs", "dermoscopy-four-sites")
# Values that each method sends for CLIP ViT-B/16, in float32. LoRA and FedCLIP: from the shapes of their
# published code (q, k and v of both towers; two linear layers of 512); PromptFL: 16 context tokens.
OTHERS = {
    "full fine-tuning": 149_620_737,
    "FedCLIP adapter": 2 * (512 * 512 + 512),
    "CLIP-LoRA r=2": 2 * 3 * 2 * 12 * (768 + 512),
    "PromptFL": 16 * 512,
}


def trained_changes(weights: str | None, rounds: int) -> tuple[Layout, list[np.ndarray]]:
    """The changes that one site makes in so many rounds of its own on ViT-B/16."""
    study = load_study(STUDIES[0])
    backbone = load_backbone(weights) if weights else step.backbone(step.build()[0])
    sigma = SigmaModel.adapt(backbone.model)
    task = ClipClassifier(backbone, sigma, study.prompts)
    sites = validation_sites(study, backbone.image_size * 3 // 2, 1)
    examples, steps = next(iter(sites.values()))[0], study.training.local_steps
    shift, changes = np.zeros(sigma.layout.size, np.float32), []
    for number in range(rounds):
        train(
            task,
            examples,
            study.training,
            first_step=number * steps,
            steps=steps,
            total_steps=rounds * steps,
            seed=derive_seed(study.seed, "wire", number),
        )
        before, shift = shift, sigma.get_shift().detach().numpy().copy()
        changes.append(shift - before)
        print(f"trained round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return sigma.layout, changes


def reply_bytes(coded: bytes) -> int:
    """The size of the reply with this coded change, as the site hands it to Flower."""
    scores = Evaluation(accuracy=0.5, balanced_accuracy=0.5, auroc=0.5, f1=0.5, ece=0.1, test_examples=100)
    return wire_bytes(to_record(TrainReply(update=coded, examples=64, steps=2, loss=1.0, evaluation=scores)))


def measure(layout: Layout, changes: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Most bytes and mean relative error of each level, with error feedback between the rounds."""
    found: dict[str, dict[str, float]] = {}
    for level in CODECS:
        sizes, errors, lost = [], [], np.zeros(layout.size, np.float32)
        for number, change in enumerate(changes):
            wanted = change + lost
            coded, lost = encode_update(change, lost, layout, level=level, seed=number)
            sizes.append(reply_bytes(coded))
            errors.append(float(np.linalg.norm(lost) / np.linalg.norm(wanted)))
        found[level] = {"bytes": max(sizes), "relative_error": statistics.mean(errors)}
    return found


def coders(layout: Layout, changes: list[np.ndarray]) -> dict[str, float]:
    """Bits a value of the integers of level small at its finest step, by coder; the mean over the changes."""
    found: dict[str, list[float]] = {"entropy": [], "zstandard": []}
    for number, change in enumerate(changes):
        payload, _ = quantization.pack(change, layout.entry_sizes, number, fraction=SMALL_STEP)
        raw = np.frombuffer(zstandard.decompress(payload[9 + len(layout.entry_sizes) :]), np.uint8)
        symbols = np.stack([raw >> 4, raw & 15], 1).ravel() if payload[8] == 4 else raw
        _, index, counts = np.unique(symbols, return_inverse=True, return_counts=True)
        shares = counts / counts.sum()
        found["entropy"].append(float(-(shares * np.log2(shares)).sum()))
        found["zstandard"].append(8 * (len(payload) - 9 - len(layout.entry_sizes)) / layout.size)
        try:
            import constriction
        except ModuleNotFoundError:
            continue
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(index.astype(np.int32), constriction.stream.model.Categorical(shares, perfect=False))
        # The reader needs the counts, too: 2 bytes for each integer that occurs.
        size = 4 * len(coder.get_compressed()) + 2 * len(counts)
        found.setdefault("range coder", []).append(8 * size / layout.size)
    return {name: statistics.mean(values) for name, values in found.items()}


def accuracy(study: StudyConfig, level: str, seed: int, out: Path) -> float:
    """The federated accuracy of one study at one level, run now unless it was before."""
    folder = out / f"{study.name}-{level}-s{seed}"
    file = folder.with_suffix(".yaml")
    if not (folder / "summary.json").exists():
        federation = replace(study.federation, codec=level, evaluate_every=study.federation.rounds)
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(replace(study, federation=federation, baselines=()).to_yaml(), encoding="utf-8")
        code = run_simulation(str(file), out=folder, seed=seed, resume=(folder / "study.yaml").exists())
        if code:
            raise SystemExit(f"{study.name}, {level}, seed {seed}: the run ended with code {code}")
    return float(RunDir.open(folder).read_summary()["federated"]["accuracy"])


def drops(levels: list[str], seeds: list[int], out: Path, studies: list[str]) -> dict[str, Any]:
    """Accuracy of each level and study by seed, and the loss against exact."""
    # Exact first, and each level for all seeds before the next: a call that is cut off leaves whole rows.
    reached = {
        level: {name: [accuracy(load_study(name), level, seed, out) for seed in seeds] for name in studies}
        for level in dict.fromkeys(["exact", *levels])
    }
    found: dict[str, Any] = {}
    for level, accuracies in reached.items():
        lost = {
            name: 100 * (statistics.mean(reached["exact"][name]) - statistics.mean(accuracies[name]))
            for name in studies
        }
        found[level] = {"accuracy": accuracies, "drop": lost, "accuracy_drop": max(lost.values())}
    return found


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"{'one upload, CLIP ViT-B/16':28}{'bytes':>14}{'relative error':>16}{'points lost':>13}")
    for level in CODECS:
        row = figures[level]
        drop = row.get("accuracy_drop")
        lost = "not run" if drop is None else f"{drop:.2f}"
        print(f"  sigma, {level:19}{row['bytes']:14,}{row['relative_error']:16.4f}{lost:>13}")
    for name, values in OTHERS.items():
        print(f"  {name:26}{4 * values:14,}")
    print("\nbits a value of level small: " + ", ".join(f"{n} {b:.3f}" for n, b in figures["coders"].items()))
    for level in CODECS:
        for name, values in figures[level].get("accuracy", {}).items():
            seeds = ", ".join(f"{100 * value:.1f}" for value in values)
            print(f"{name}, {level}: mean {100 * statistics.mean(values):.2f} ({seeds})")


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--weights", help="of CLIP ViT-B/16")
    p.add_argument("--rounds", type=int, default=5, help="rounds of the trained change")
    p.add_argument("--levels", nargs="*", choices=CODECS, default=["small", "int8", "half"])
    p.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    os.environ["FEDSIGMA_DATA"] = str(a.data.resolve())
    layout, changes = trained_changes(a.weights, a.rounds)
    figures: dict[str, Any] = dict(measure(layout, changes))
    if a.levels:
        for level, row in drops(a.levels, a.seeds, a.out.resolve(), a.studies).items():
            figures[level] |= row
    figures["coders"] = coders(layout, changes)
    figures["others"] = {name: 4 * values for name, values in OTHERS.items()}
    show(figures)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
