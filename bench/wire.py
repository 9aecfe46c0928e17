"""The cost of an upload at each coding level: bytes, error and accuracy, beside the uploads of other methods.

    python -m bench.wire --data DIR --out out/wire --json out/wire.json

Three measurements:

- bytes and relative error of each level on a trained update of CLIP ViT-B/16: 92,160 values, trained on white
  cells of one laboratory, two steps a round with the study's recipe. Bytes are those of a site's complete
  reply. The weights are random unless --weights names some (`ViT-B-16/openai`, `local-dir:...`).
- bits of a value of the same integers by zstandard, which the codec uses, by constriction's range coder (if
  installed) and at their entropy.
- accuracy of the two studies on real images at each level, three seeds, as runs by `flwr run` without
  baselines. accuracy_drop is the loss against level exact in points, the mean over the seeds, of the study
  that loses more.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from bench import step
from bench.harness import REQUIRED, Table, argument_parser, parse_arguments, write_json
from bench.runs import REAL_STUDIES, run_study
from bench.tune import validation_sites
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.constants import CODECS
from fedsigma.common.config.study import load_study
from fedsigma.common.sigma import Layout, SigmaModel
from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.loop import train
from fedsigma.common.training.trainer import derive_seed
from fedsigma.common.wire import quantization
from fedsigma.common.wire.codec import SMALL_STEP, encode_update
from fedsigma.common.wire.records import Evaluation, TrainReply, to_record, wire_bytes

OTHERS = {
    "full fine-tuning": 149_620_737,
    "FedCLIP adapter": 2 * (512 * 512 + 512),
    "CLIP-LoRA r=2": 2 * 3 * 2 * 12 * (768 + 512),
    "PromptFL": 16 * 512,
}
"""Values that each method sends for CLIP ViT-B/16. LoRA and FedCLIP: from the shapes of their published code
(q, k and v of both towers; two linear layers of 512); PromptFL: 16 context tokens."""


def trained_updates(weights: str | None, rounds: int) -> tuple[Layout, list[np.ndarray]]:
    """Return the updates of one site that trains alone for so many rounds on ViT-B/16."""
    study = load_study(REAL_STUDIES[0])
    backbone = load_backbone(weights) if weights else step.backbone(step.build()[0])
    sigma = SigmaModel.adapt(backbone.model)
    task = ClipClassifier(backbone, sigma, study.prompts)
    sites = validation_sites(study, backbone.image_size * 3 // 2, 1)
    examples, steps = next(iter(sites.values()))[0], study.training.local_steps
    shift, updates = np.zeros(sigma.layout.size, np.float32), []
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
        updates.append(shift - before)
        print(f"trained round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return sigma.layout, updates


def reply_bytes(coded: bytes) -> int:
    """Return the size of a reply with this coded update, as the site hands it to Flower."""
    scores = Evaluation(accuracy=0.5, balanced_accuracy=0.5, auroc=0.5, f1=0.5, ece=0.1, test_examples=100)
    return wire_bytes(to_record(TrainReply(update=coded, examples=64, steps=2, loss=1.0, evaluation=scores)))


def measure(layout: Layout, updates: list[np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return largest size and mean relative error of each level, with error feedback between the rounds."""
    figures = {}
    for level in CODECS:
        sizes, errors, residual = [], [], np.zeros(layout.size, np.float32)
        for number, update in enumerate(updates):
            corrected = update + residual
            coded, residual = encode_update(update, residual, layout, level=level, seed=number)
            sizes.append(reply_bytes(coded))
            errors.append(float(np.linalg.norm(residual) / np.linalg.norm(corrected)))
        figures[level] = {"bytes": max(sizes), "relative_error": statistics.mean(errors)}
    return figures


def coders(layout: Layout, updates: list[np.ndarray]) -> dict[str, float]:
    """Return the mean bits of a value of level small at its finest step, by coder."""
    bits: dict[str, list[float]] = {"entropy": [], "zstandard": []}
    for number, update in enumerate(updates):
        payload, _ = quantization.pack(update, layout.entry_sizes, number, fraction=SMALL_STEP)
        raw = np.frombuffer(zstandard.decompress(payload[9 + len(layout.entry_sizes) :]), np.uint8)
        symbols = np.stack([raw >> 4, raw & 15], 1).ravel() if payload[8] == 4 else raw
        _, index, counts = np.unique(symbols, return_inverse=True, return_counts=True)
        shares = counts / counts.sum()
        bits["entropy"].append(float(-(shares * np.log2(shares)).sum()))
        bits["zstandard"].append(8 * (len(payload) - 9 - len(layout.entry_sizes)) / layout.size)
        try:
            import constriction
        except ModuleNotFoundError:
            continue
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(index.astype(np.int32), constriction.stream.model.Categorical(shares, perfect=False))
        # Decoding needs the counts as well: 2 bytes for each integer that occurs.
        size = 4 * len(coder.get_compressed()) + 2 * len(counts)
        bits.setdefault("range coder", []).append(8 * size / layout.size)
    return {name: statistics.mean(values) for name, values in bits.items()}


def accuracy(name: str, level: str, seed: int, out: Path) -> float:
    """Return the federated accuracy of one study at one level."""
    study = load_study(name)
    federation = replace(study.federation, codec=level, evaluate_every=study.federation.rounds)
    study = replace(study, federation=federation, baselines=())
    return float(run_study(study, out / f"{name}-{level}-s{seed}", seed=seed)["federated"]["accuracy"])


def drops(levels: list[str], seeds: list[int], out: Path, studies: list[str]) -> dict[str, Any]:
    """Return the accuracy of each level and study by seed, and the loss against exact."""
    # Exact first, and each level with all seeds before the next: an interrupted call leaves complete rows.
    accuracies = {
        level: {name: [accuracy(name, level, seed, out) for seed in seeds] for name in studies}
        for level in dict.fromkeys(["exact", *levels])
    }
    figures: dict[str, Any] = {}
    for level, by_study in accuracies.items():
        drop = {
            name: 100 * (statistics.mean(accuracies["exact"][name]) - statistics.mean(by_study[name]))
            for name in studies
        }
        figures[level] = {"accuracy": by_study, "drop": drop, "accuracy_drop": max(drop.values())}
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    columns = {"one upload, CLIP ViT-B/16": "<27", "bytes": ">14,", "relative error": ">15.4f"}
    table = Table(columns | {"points lost": ">12.2f"})
    for level in CODECS:
        row = figures[level]
        table.row(
            f"  sigma, {level}", row["bytes"], row["relative_error"], row.get("accuracy_drop", "not run")
        )
    for name, count in OTHERS.items():
        table.row(f"  {name}", 4 * count, None, None)
    bits = ", ".join(f"{name} {bits:.3f}" for name, bits in figures["coders"].items())
    print(f"\nbits of a value of level small: {bits}")
    for level in CODECS:
        for name, values in figures[level].get("accuracy", {}).items():
            seeds = ", ".join(f"{100 * value:.1f}" for value in values)
            print(f"{name}, {level}: mean {100 * statistics.mean(values):.2f} ({seeds})")


def main() -> None:
    """Measure and print."""
    help_text = "rounds of the trained update"
    p = argument_parser(
        __doc__, data=REQUIRED, out=REQUIRED, seeds=(1, 2, 3), rounds=5, rounds_help=help_text
    )
    p.add_argument("--weights", help="of CLIP ViT-B/16")
    p.add_argument("--levels", nargs="*", choices=CODECS, default=["small", "int8", "half"])
    p.add_argument("--studies", nargs="+", choices=REAL_STUDIES, default=list(REAL_STUDIES))
    options = parse_arguments(p)
    layout, updates = trained_updates(options.weights, options.rounds)
    figures: dict[str, Any] = dict(measure(layout, updates))
    if options.levels:
        for level, row in drops(options.levels, options.seeds, options.out, options.studies).items():
            figures[level] |= row
    figures["coders"] = coders(layout, updates)
    figures["others"] = {name: 4 * count for name, count in OTHERS.items()}
    show(figures)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
