"""The cost of a round for the server by the number of sites: its own seconds, memory and disk.

    python -m bench.scale --out out/scale --json out/scale.json --figure out/scale.png

The server's side of a study is real: handshake, tasks, validation, averaging, events and rows, checkpoint.
The sites are not. `RecordedGrid` replaces Flower's and returns recorded uploads: random updates of CLIP
ViT-B/16's 92,160 values, coded as sites code them, made once and kept under --out. Of --uploads different
ones each site sends one, as a separate record. The time of this grid is subtracted, so Flower's transport and
the sites' work are not in these figures.

`seconds` are the server's own: by the clock, less the time in which it was ready to run while other work on
the machine had the processors (Linux's schedstat). `clock_s` is by the clock alone, `cpu_s` its processor
time; on a quiet machine the first two are equal. They are those of the fastest of --rounds rounds.

Each row is a process of its own, and its peak memory is that of its rounds (VmHWM). Growth is over the least
number of sites. Disk is the computed size of the file in which a round's updates are spooled; --out
must be on a disk, since a file in memory (tmpfs) is not counted. fedmedian stands for the strategies that
need all replies at once, measured to --robust sites.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from bench.harness import Table, argument_parser, parse_arguments, peak_mib, reset_peak, write_json
from fedsigma.common.config.constants import CODECS
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.ops.flower_compat import set_message_id, set_task_identity
from fedsigma.common.sigma import Fingerprint, Layout, ParameterPartition
from fedsigma.common.wire.codec import VERSION, encode
from fedsigma.common.wire.records import (
    HANDSHAKE,
    PROTOCOL,
    Evaluation,
    HandshakeReply,
    TrainReply,
    to_record,
)

ARCHITECTURE = "ViT-B-16"
MAX_SECONDS, MAX_MB = 2.0, 200.0
"""The aims for strategies that average: a round of 1,000 sites, and memory of 10,000 beyond that of 10."""
COLUMNS = {"strategy": "<9", "codec": "<6", "sites": ">6,"}
COLUMNS |= dict.fromkeys(("seconds", "clock_s", "cpu_s", "peak_mb", "growth_mb", "disk_mb"), ">9.4g")
STUDY = """
name: scale
backbone: none
classes: [a, b]
shots: 16
training: {{local_steps: 5}}
federation: {{rounds: {rounds}, min_sites: 2, strategy: {strategy}, codec: {codec}, norm_factor: 10}}
baselines: []
"""


def read_clocks() -> NDArray[np.float64]:
    """Return seconds of the clock less this thread's waits for a processor, of the clock, of processors."""
    waited = int(Path("/proc/thread-self/schedstat").read_text("ascii").split()[1]) / 1e9
    clock = time.perf_counter()
    return np.array([clock - waited, clock, time.process_time()])


class RecordedGrid(Grid):
    """Sites that reply at once, each with a recorded upload; counts its own seconds in `spent`."""

    def __init__(self, sites: int, uploads: list[Path], fingerprint: Fingerprint) -> None:
        set_task_identity(1)
        self.sites, self.uploads = sites, uploads
        self.spent = np.zeros(3)
        self._hello = fingerprint.to_json()
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """Node 100 and those after it."""
        return list(range(100, 100 + self.sites))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Store the tasks; they are answered when their replies are pulled."""
        start, ids = read_clocks(), []
        for message in messages:
            name = f"to-{message.metadata.dst_node_id}"
            set_message_id(message, name)
            self._waiting[name] = message
            ids.append(name)
        self.spent += read_clocks() - start
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these tasks, each a separate record."""
        start = read_clocks()
        tasks = [self._waiting.pop(name) for name in message_ids]
        replies = [Message(self._reply(task), reply_to=task) for task in tasks]
        self.spent += read_clocks() - start
        return replies

    def _no(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("the server's side pushes and pulls")

    set_run = create_message = get_nodes = send_and_receive = _no  # type: ignore[assignment]
    run = property(_no)  # type: ignore[assignment]

    def _reply(self, task: Message) -> RecordDict:
        number = task.metadata.dst_node_id - 100
        if task.metadata.message_type == HANDSHAKE:
            name, version = f"site-{number:05}", "0"
            return to_record(
                HandshakeReply(protocol=PROTOCOL, site=name, fingerprint=self._hello, version=version)
            )
        evaluation = Evaluation(
            accuracy=0.75, balanced_accuracy=0.7, auroc=0.8, f1=0.7, ece=0.1, test_examples=100
        )
        return to_record(
            TrainReply(
                update=self.uploads[number % len(self.uploads)].read_bytes(),
                examples=1 + number % 32,
                steps=5,
                loss=1.0,
                evaluation=evaluation,
            )
        )


def upload(out: Path, codec: str, number: int) -> Path:
    """Return the file of a coded update."""
    return out / f"{codec}-{VERSION}-{number}.bin"


def record(out: Path, codecs: Iterable[str], count: int) -> None:
    """Write the layout of ViT-B/16 and so many coded updates a level, unless present."""
    from fedsigma.common.backbones.load import load_meta_model
    from fedsigma.common.sigma import find_layout

    layout = find_layout(load_meta_model(ARCHITECTURE))
    (out / "layout.json").write_text(layout.to_json(), encoding="utf-8")
    for codec in codecs:
        for number in range(count):
            path = upload(out, codec, number)
            if not path.exists():
                update = 0.01 * np.random.default_rng(number).standard_normal(layout.size, np.float32)
                path.write_bytes(encode(update, layout, level=codec, seed=number))


def measure(out: Path, *, sites: int, strategy: str, codec: str, rounds: int, uploads: int) -> dict[str, Any]:
    """Run rounds in this process; returns the server's seconds of the fastest and its peak memory."""
    from fedsigma.server.federation import checkpoint
    from fedsigma.server.federation.federation import Federation
    from fedsigma.server.federation.messenger import Messenger
    from fedsigma.server.federation.rounds import run_round
    from fedsigma.server.runs.run_dir import RunDir

    layout = Layout.from_json((out / "layout.json").read_text(encoding="utf-8"))
    fingerprint = Fingerprint("a" * 64, layout.digest, ((1.0,),) * len(layout.entries))
    study = StudyConfig.from_yaml(STUDY.format(rounds=rounds, strategy=strategy, codec=codec))
    folder = RunDir.create(out / f"run-{os.getpid()}", study.to_yaml())
    grid = RecordedGrid(sites, [upload(out, codec, number) for number in range(uploads)], fingerprint)
    federation = Federation(study, folder, Messenger(grid), ParameterPartition(layout), fingerprint)
    federation.site_manager.wait_for_sites()
    shift = np.zeros(layout.size, np.float32)
    reset_peak()
    times = []
    for number in range(1, rounds + 1):
        start = read_clocks() - grid.spent
        outcome = run_round(federation, number, shift)
        assert outcome.shift is not None
        shift = outcome.shift
        checkpoint.save(federation, shift, round=number)
        times.append((read_clocks() - grid.spent - start).tolist())
    seconds, clock, cpu = min(times)
    peak = peak_mib()
    accepted = sum(row["status"] == "accepted" for row in folder.rounds())
    assert accepted == sites * rounds, f"{accepted} of {sites * rounds} replies were accepted"
    figures = {"sites": sites, "strategy": strategy, "codec": codec, "seconds": seconds}
    return figures | {"clock_s": clock, "cpu_s": cpu, "peak_mb": peak}


def measure_in_process(out: Path, **settings: Any) -> dict[str, Any]:
    """Run `measure` in a process of its own."""
    command = [sys.executable, "-m", "bench.scale", "--out", str(out), "--measure", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print every row of the table."""
    plan = [("fedavg", codec, sites) for codec in options.codecs for sites in sorted(options.sites)]
    plan += [("fedmedian", "exact", sites) for sites in sorted(options.sites) if sites <= options.robust]
    record(options.out, {codec for _, codec, _ in plan}, options.uploads)
    values = Layout.from_json((options.out / "layout.json").read_text(encoding="utf-8")).size
    rows: list[dict[str, Any]] = []
    table = Table(COLUMNS)
    for strategy, codec, sites in plan:
        settings = {"rounds": options.rounds, "uploads": options.uploads}
        row = measure_in_process(options.out, sites=sites, strategy=strategy, codec=codec, **settings)
        same = (r for r in rows if (r["strategy"], r["codec"]) == (strategy, codec))
        row["growth_mb"] = row["peak_mb"] - next(same, row)["peak_mb"]
        row["disk_mb"] = sites * 4 * values / 1e6
        rows.append(row)
        table.row(*(row[name] for name in COLUMNS))
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Return whether each aim is met."""
    lines = []
    for row in rows:
        if row["strategy"] == "fedavg" and row["sites"] == 1000:
            met = "met" if row["seconds"] < MAX_SECONDS else "MISSED"
            lines.append(f"{met}: {row['codec']}, 1,000 sites: {row['seconds']:.2f} s, aim {MAX_SECONDS:g} s")
        if row["strategy"] == "fedavg" and row["sites"] == 10_000 and row["growth_mb"]:
            met = "met" if row["growth_mb"] < MAX_MB else "MISSED"
            growth = f"{row['growth_mb']:.0f} MB more, aim {MAX_MB:g} MB"
            lines.append(f"{met}: {row['codec']}, 10,000 sites: {growth}")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and memory by the number of sites, a line for each strategy and coding level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    drawn = list(dict.fromkeys((row["strategy"], row["codec"]) for row in rows))
    # Markers of different sizes, since lines coincide.
    looks = zip(("C0", "C1", "0.45", "C2"), (9, 5, 7, 3), strict=True)
    for (strategy, codec), (colour, size) in zip(drawn, looks, strict=False):
        line = [row for row in rows if (row["strategy"], row["codec"]) == (strategy, codec)]
        sites, style = [row["sites"] for row in line], "-" if strategy == "fedavg" else "--"
        for axis, key in ((time_axis, "seconds"), (memory_axis, "peak_mb")):
            label = f"{strategy}, {codec}" + ("" if strategy == "fedavg" else " (needs all replies at once)")
            values = [row[key] for row in line]
            axis.plot(sites, values, style, marker="o", markersize=size, color=colour, label=label)
    base = min(row["peak_mb"] for row in rows if row["strategy"] == "fedavg")
    time_axis.plot(1000, MAX_SECONDS, "v", color="C3", markersize=9, linestyle="none")
    text, offset = f"aim: {MAX_SECONDS:g} s\nat 1,000 sites", (16, -36)
    time_axis.annotate(text, (1000, MAX_SECONDS), offset, textcoords="offset points", color="C3")
    memory_axis.axhspan(base, base + MAX_MB, color="C3", alpha=0.12, label=f"aim: {MAX_MB:g} MB more")
    time_axis.set(yscale="log", title="The server's own time a round", ylabel="seconds")
    memory_axis.set(ylim=0, title="The server's peak memory", ylabel="MB")
    for axis in (time_axis, memory_axis):
        axis.set(xscale="log", xlabel="sites")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *memory_axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, and print the table and whether the aims are met."""
    p = argument_parser(__doc__, out="out/scale", rounds=3, rounds_help="rounds of each row")
    p.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    p.add_argument("--codecs", nargs="+", choices=CODECS, default=["exact", "int8"])
    p.add_argument("--robust", type=int, default=1000, help="most sites of a strategy that needs all replies")
    p.add_argument("--uploads", type=int, default=64, help="different recorded updates")
    p.add_argument("--figure", type=Path)
    p.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parse_arguments(p)
    if options.measure:
        print(json.dumps(measure(options.out, **options.measure)))
        return
    rows = sweep(options)
    for line in verdicts(rows):
        print(line)
    write_json(options.json, {"lines": rows})
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
