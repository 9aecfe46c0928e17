"""One hostile or broken site among four: its effect on the others, and the defences that stop it.

    python -m bench.attacks --out out/attacks --json out/attacks.json

The demonstration study on the starter backbone, run in one process by the real ServerApp and ClientApp; the
fourth site (west) is hostile. Accuracy is over the other sites' test images, in per cent. Columns:

- none: a plain mean, and norm_factor null (replies are still validated for form, finiteness and counts);
- factor: a plain mean with the default norm_factor;
- median, trimmed, krum: FedMedian, FedTrimmedAvg (beta 0.25) and Krum (one hostile site), no norm_factor.

An attack that the validation of a single reply rejects is run once.
"""

from __future__ import annotations

import statistics
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import Message

from bench.harness import REQUIRED, Table, argument_parser, parse_arguments, write_json
from bench.runs import run_in_process
from fedsigma.client.app import app as client
from fedsigma.client.site.site import Site
from fedsigma.common.config.study import load_study
from fedsigma.common.sigma import Layout
from fedsigma.common.training.trainer import open_trainer
from fedsigma.common.wire.codec import decode, encode
from fedsigma.common.wire.records import HANDSHAKE, StudySpec
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
Attack = Callable[[Values, Layout], Values | None]
"""From the fields of an honest reply to those that replace them; None for no reply."""


def with_update(transform: Callable[[np.ndarray], np.ndarray]) -> Attack:
    """Return an attack that transforms the trained update."""
    return lambda values, layout: {"update": encode(transform(decode(values["update"], layout)), layout)}


def noise(x: np.ndarray) -> np.ndarray:
    """Return a random direction, ten times as long as the update."""
    values = np.random.default_rng(int(1e6 * abs(x[0])) + 1).normal(size=x.size)
    return 10 * values * np.linalg.norm(x) / np.linalg.norm(values)


def forged(value: float) -> Attack:
    """Return an attack that sets one value of the update, with a valid checksum."""

    def attack(values: Values, _: Layout) -> Values:
        data = bytearray(values["update"])
        data[-4:] = struct.pack("<f", value)
        data[48:52] = struct.pack("<I", zlib.crc32(bytes(data[52:]), zlib.crc32(bytes(data[:48]))))
        return {"update": bytes(data)}

    return attack


def other_layout(values: Values, layout: Layout) -> Values:
    """Send an update of a layout with swapped towers."""
    swapped = {"image": "text", "text": "image"}
    entries = tuple(replace(entry, tower=swapped[entry.tower]) for entry in layout.entries)
    return {"update": encode(decode(values["update"], layout), Layout(entries))}


def replay() -> Attack:
    """Return an attack that repeats the first round's reply."""
    first: Values = {}

    def attack(values: Values, _: Layout) -> Values:
        first.update(first or values)
        return first

    return attack


# Rejected by the validation of one reply or of the handshake, whatever the strategy.
REJECTED: dict[str, Attack] = {
    "not a number": forged(float("nan")),
    "infinite": forged(float("inf")),
    "wrong layout": other_layout,
    "wrong fingerprint": lambda values, _: {"fingerprint": values["fingerprint"].replace("0", "1")},
    "10^9 examples": lambda *_: {"examples": 10**9},
    "100 MB reply": lambda *_: {"update": b"\0" * 100_000_000},
    "silence": lambda *_: None,
}
SUBTLE: dict[str, Attack] = {
    "honest": lambda *_: {},
    "sign flip": with_update(lambda x: -x),
    "sign flip x 5": with_update(lambda x: -5 * x),
    "scaling x 100": with_update(lambda x: 100 * x),
    "random": with_update(noise),
    "label flip": lambda *_: {},
    "replay": replay(),
}


@contextmanager
def flipped_labels() -> Iterator[None]:
    """Let the hostile site train with the next class's label for each image."""
    original = Site.images

    def images(site: Site, study: StudySpec, *, side: int) -> Any:
        data = original(site, study, side=side)
        if site.name != HOSTILE:
            return data
        train = [replace(e, label=(e.label + 1) % len(study.classes)) for e in data.train]
        return replace(data, train=train)

    with mock.patch.object(Site, "images", images):
        yield


def run(name: str, attack: Attack, defence: str, rounds: int, out: Path) -> tuple[float, list[str]]:
    """Return the accuracy over the honest sites, and the reasons for which the hostile one was rejected."""
    demo = load_study("demo")
    federation = replace(demo.federation, rounds=rounds, evaluate_every=rounds, options={}, round_timeout_s=5)
    federation = replace(federation, **DEFENCES[defence])
    training = replace(demo.training, local_steps=4)
    study = replace(demo, federation=federation, training=training, baselines=())
    layout = open_trainer(study.backbone, study.sigma, study.classes, study.prompts).layout
    kind = HANDSHAKE if name == "wrong fingerprint" else "train"

    def tamper(node: int, task: Message, reply: Message) -> Message | None:
        if node != NODE or task.metadata.message_type != kind or not reply.has_content():
            return reply
        values = reply.content.config_records["fedsigma"]
        changed = attack(dict(values), layout)
        if changed is None:
            return None
        values.update(changed)
        return reply

    folder = out / f"{name.replace(' ', '-').replace('^', '')}-{defence}"
    with flipped_labels() if name == "label flip" else nullcontext():
        run_dir = run_in_process(study, folder, FakeGrid(client, 4, tamper=tamper))
    per_site = run_dir.read_summary()["federated"]["per_site"]
    kinds = ("reply_rejected", "site_refused", "site_timed_out")
    events = [event for event in run_dir.events() if event["kind"] in kinds and event["site"] == HOSTILE]
    honest = [value for site, value in per_site.items() if site != HOSTILE]
    return statistics.mean(honest), [event.get("reason", "no reply in time") for event in events]


def main() -> None:
    """Run what is missing and print the table."""
    options = parse_arguments(argument_parser(__doc__, out=REQUIRED, rounds=6))
    figures: dict[str, Any] = {}
    for name, attack in (REJECTED | SUBTLE).items():
        defences = ["none"] if name in REJECTED else list(DEFENCES)
        results = {defence: run(name, attack, defence, options.rounds, options.out) for defence in defences}
        row: dict[str, Any] = {defence: accuracy for defence, (accuracy, _) in results.items()}
        reasons = results["none" if name in REJECTED else "factor"][1]
        figures[name] = row | {"rejected": reasons[:1], "times": len(reasons)}
    table = Table({"attack": "<20", **dict.fromkeys(DEFENCES, ">9.1f"), " rejected by validation": "<"})
    for name, row in figures.items():
        text = f" {row['times']} times: {row['rejected'][0]}" if row["rejected"] else ""
        table.row(name, *(100 * row[d] if d in row else None for d in DEFENCES), text)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
