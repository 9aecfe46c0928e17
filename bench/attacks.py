"""One hostile or broken site among four: what it costs the others, and what stops it.

    python -m bench.attacks --out out/attacks --json out/attacks.json

The demonstration study on the starter backbone, driven in one process by the real ServerApp and ClientApp;
the fourth site (west) is hostile. Accuracy is that of the others' test images, in per cent. Columns:

- none: a plain mean, and norm_factor null (replies are still checked for form, finiteness and counts);
- factor: a plain mean with the default norm_factor;
- median, trimmed, krum: FedMedian, FedTrimmedAvg (beta 0.25) and Krum (one hostile site), no norm_factor.

An attack that the check of a single reply refuses is run once. Finished runs under --out are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict

from fedsigma.client.app import app as client
from fedsigma.client.site import site as client_site
from fedsigma.common.config.study import load_study
from fedsigma.common.sigma import Layout
from fedsigma.common.training.trainer import open_trainer
from fedsigma.common.wire.codec import decode, encode
from fedsigma.server.app import app as server
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import FakeGrid

HOSTILE, NODE = "west", 103
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {"strategy": "fedavg", "norm_factor": None},
    "factor": {"strategy": "fedavg"},
    "median": {"strategy": "fedmedian", "norm_factor": None},
    "trimmed": {"strategy": "fedtrimmedavg", "options": {"beta": 0.25}, "norm_factor": None},
    "krum": {"strategy": "krum", "options": {"num_malicious_nodes": 1}, "norm_factor": None},
}
Values = dict[str, Any]
Change = Callable[[Values, Layout], Values | None]


def moved(by: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Send another change than the trained one."""
    return lambda values, layout: {"update": encode(by(decode(values["update"], layout)), layout)}


def noise(x: np.ndarray) -> np.ndarray:
    """Ten times as long as the change, in a direction of its own each time."""
    values = np.random.default_rng(int(1e6 * abs(x[0])) + 1).normal(size=x.size)
    return 10 * values * np.linalg.norm(x) / np.linalg.norm(values)


def forged(value: float) -> Change:
    """A change with one value that no FedSigma would send, behind a right checksum."""

    def change(values: Values, _: Layout) -> Values:
        data = bytearray(values["update"])
        data[-4:] = struct.pack("<f", value)
        data[48:52] = struct.pack("<I", zlib.crc32(bytes(data[52:]), zlib.crc32(bytes(data[:48]))))
        return {"update": bytes(data)}

    return change


def other_layout(values: Values, layout: Layout) -> Values:
    """A change of a layout with the towers named the other way round."""
    swapped = {"image": "text", "text": "image"}
    entries = tuple(replace(entry, tower=swapped[entry.tower]) for entry in layout.entries)
    return {"update": encode(decode(values["update"], layout), Layout(entries))}


def replay() -> Change:
    """Send the first round's reply again and again."""
    kept: Values = {}

    def change(values: Values, _: Layout) -> Values:
        kept.update(kept or values)
        return kept

    return change


# Refused by the check of one reply or of the handshake, whatever the strategy.
REFUSED: dict[str, Change] = {
    "not a number": forged(float("nan")),
    "infinite": forged(float("inf")),
    "wrong layout": other_layout,
    "wrong fingerprint": lambda values, _: {"fingerprint": values["fingerprint"].replace("0", "1")},
    "10^9 examples": lambda *_: {"examples": 10**9},
    "100 MB reply": lambda *_: {"update": b"\0" * 100_000_000},
    "silence": lambda *_: None,
}
SUBTLE: dict[str, Change] = {
    "honest": lambda *_: {},
    "sign flip": moved(lambda x: -x),
    "sign flip x 5": moved(lambda x: -5 * x),
    "scaling x 100": moved(lambda x: 100 * x),
    "random": moved(noise),
    "label flip": lambda *_: {},
    "replay": replay(),
}


def flip_labels(wanted: bool) -> None:
    """Have the hostile site train on the next class's name for each image, or not."""
    original = getattr(client_site, "_unflipped", client_site._images)
    client_site._unflipped = original  # type: ignore[attr-defined]
    original.cache_clear()

    def images(site: Any, setup: Any, side: int) -> Any:
        found = original(site, setup, side)
        if site.name != HOSTILE:
            return found
        train = [replace(one, label=(one.label + 1) % len(setup.classes)) for one in found.train]
        return replace(found, train=train)

    client_site._images = images if wanted else original  # type: ignore[assignment]


def run(attack: str, change: Change, defence: str, rounds: int, out: Path) -> tuple[float, list[str]]:
    """Accuracy over the honest sites, and the reasons for which the server refused the hostile one."""
    folder = out / f"{attack.replace(' ', '-').replace('^', '')}-{defence}"
    if not (folder / "summary.json").exists():
        demo = load_study("demo")
        federation = replace(
            demo.federation, rounds=rounds, evaluate_every=rounds, options={}, round_timeout_s=5
        )
        federation = replace(federation, **DEFENCES[defence])
        study = replace(demo, federation=federation, baselines=())
        study = replace(study, training=replace(study.training, local_steps=4))
        file = out / f"{folder.name}.yaml"
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(study.to_yaml(), encoding="utf-8")
        layout = open_trainer(study.backbone, study.sigma, study.classes, study.prompts).layout
        kind = "query.hello" if attack == "wrong fingerprint" else "train"

        def tamper(node: int, task: Message, reply: Message) -> Message | None:
            if node != NODE or task.metadata.message_type != kind or not reply.has_content():
                return reply
            values = reply.content.config_records["fedsigma"]
            found = change(dict(values), layout)
            if found is None:
                return None
            values.update(found)
            return reply

        flip_labels(attack == "label flip")
        config: dict[str, Any] = {"study": str(file), "out": str(folder), "resume": False}
        context = Context(1, 1, {}, RecordDict(), config | {"seed": -1, "rounds": 0})
        server(FakeGrid(client, 4, tamper=tamper), context)
    kept = RunDir.open(folder)
    per_site = kept.read_summary()["federated"]["per_site"]
    told = [e for e in kept.events() if e["kind"] in ("reply_rejected", "site_refused", "site_timed_out")]
    reasons = [e.get("reason", "no reply in time") for e in told if e["site"] == HOSTILE]
    honest = [value for site, value in per_site.items() if site != HOSTILE]
    return statistics.mean(honest), reasons


def main() -> None:
    """Run what is missing, print both tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    out, figures = a.out.resolve(), dict[str, Any]()
    os.environ["FEDSIGMA_AUDIT"] = str(out / "audit")
    for attack, change in REFUSED.items():
        accuracy, reasons = run(attack, change, "none", a.rounds, out)
        figures[attack] = {"none": accuracy, "refused": reasons[:1], "times": len(reasons)}
    for attack, change in SUBTLE.items():
        row = {defence: run(attack, change, defence, a.rounds, out) for defence in DEFENCES}
        figures[attack] = {defence: accuracy for defence, (accuracy, _) in row.items()}
        figures[attack] |= {"refused": row["factor"][1][:1], "times": len(row["factor"][1])}
    print(f"{'attack':20}" + "".join(f"{name:>10}" for name in DEFENCES) + "  refused by the check")
    for attack, row in figures.items():
        cells = [f"{100 * row[name]:.1f}" if name in row else "" for name in DEFENCES]
        why = f"  {row['times']} times: {row['refused'][0]}" if row["refused"] else ""
        print(f"{attack:20}" + "".join(f"{cell:>10}" for cell in cells) + why)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
