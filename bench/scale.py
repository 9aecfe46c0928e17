"""What a round costs the server by the number of sites: its own seconds, its memory and its disk.

    python -m bench.scale --out out/scale --json out/scale.json --figure out/scale.png

The server's side of a study is real: handshake, tasks, checks, averaging, drift, events and rows, checkpoint.
The sites are not. `RecordedGrid` stands in for Flower's and hands out recorded uploads: changes of CLIP
ViT-B/16's 92,160 values with random values, coded as sites code them, made once and kept under --out. Of
--uploads different ones each site sends one, as a record of its own. The time that this grid takes is taken
off, so Flower's transport and the sites' work are not in these numbers.

`seconds` are the server's own: by the clock, less the time in which it could have run and other work on the
machine had the processors (Linux's schedstat). `clock_s` is by the clock alone, `cpu_s` what it had of the
processors; on a quiet machine the first two are the same. They are those of the quickest of --rounds rounds.

Each line is a process of its own, and its peak memory is that of its rounds (VmHWM). Growth is over the least
number of sites. Disk is the size of the file in which a round's changes lie until they are averaged, by
reckoning; give --out a place on a disk, for a file in memory (tmpfs) would count nowhere. fedmedian stands
for the strategies that need all replies at once, measured to --robust sites.
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

from fedsigma.common.config.constants import CODECS
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.ops.flower_compat import set_message_id, set_task_identity
from fedsigma.common.sigma import Fingerprint, Layout, ParameterPartition
from fedsigma.common.utils.console import print_table
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
MOST_SECONDS, MOST_MB = 2.0, 200.0
"""The aims: a round of 1,000 sites, and what 10,000 take more than 10; for strategies that take a mean."""
HEADS = ("strategy", "codec", "sites", "seconds", "clock_s", "cpu_s", "peak_mb", "growth_mb", "disk_mb")
STUDY = """
name: scale
backbone: none
classes: [a, b]
shots: 16
training: {{local_steps: 5}}
federation: {{rounds: {rounds}, min_sites: 2, strategy: {strategy}, codec: {codec}, norm_factor: 10}}
baselines: []
"""


def now() -> NDArray[np.float64]:
    """Seconds: of the clock less what this thread waited for a processor, of the clock, of processors."""
    waited = int(Path("/proc/thread-self/schedstat").read_text("ascii").split()[1]) / 1e9
    clock = time.perf_counter()
    return np.array([clock - waited, clock, time.process_time()])


class RecordedGrid(Grid):
    """Sites that answer at once, each with a recorded upload; it counts the seconds that it takes itself."""

    def __init__(self, sites: int, uploads: list[Path], fingerprint: Fingerprint) -> None:
        set_task_identity(1)
        self.sites, self.uploads = sites, uploads
        self.taken = np.zeros(3)
        self._hello = fingerprint.to_json()
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """Node 100 and those after it."""
        return list(range(100, 100 + self.sites))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take the tasks; their answers are made when they are pulled."""
        start, ids = now(), []
        for message in messages:
            name = f"to-{message.metadata.dst_node_id}"
            set_message_id(message, name)
            self._waiting[name] = message
            ids.append(name)
        self.taken += now() - start
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers to these tasks, each a record of its own."""
        start = now()
        tasks = [self._waiting.pop(name) for name in message_ids]
        replies = [Message(self._reply(task), reply_to=task) for task in tasks]
        self.taken += now() - start
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
        found = Evaluation(
            accuracy=0.75, balanced_accuracy=0.7, auroc=0.8, f1=0.7, ece=0.1, test_examples=100
        )
        return to_record(
            TrainReply(
                update=self.uploads[number % len(self.uploads)].read_bytes(),
                examples=1 + number % 32,
                steps=5,
                loss=1.0,
                evaluation=found,
            )
        )


def upload(out: Path, codec: str, number: int) -> Path:
    """Where a coded change lies, or is to."""
    return out / f"{codec}-{VERSION}-{number}.bin"


def record(out: Path, codecs: Iterable[str], count: int) -> None:
    """Write the layout of ViT-B/16 and so many coded changes a level, as far as they are not there."""
    from fedsigma.common.backbones.load import load_meta_model
    from fedsigma.common.sigma import find_layout

    layout = find_layout(load_meta_model(ARCHITECTURE))
    (out / "layout.json").write_text(layout.to_json(), encoding="utf-8")
    for codec in codecs:
        for number in range(count):
            path = upload(out, codec, number)
            if not path.exists():
                change = 0.01 * np.random.default_rng(number).standard_normal(layout.size, np.float32)
                path.write_bytes(encode(change, layout, level=codec, seed=number))


def measure(out: Path, *, sites: int, strategy: str, codec: str, rounds: int, uploads: int) -> dict[str, Any]:
    """So many rounds in this process: the server's seconds of the quickest and its peak memory."""
    from fedsigma.server.federation import checkpoint
    from fedsigma.server.federation.aggregation import Aggregator
    from fedsigma.server.federation.messenger import Messenger
    from fedsigma.server.federation.rounds import Federation, run_round
    from fedsigma.server.federation.site_manager import SiteManager
    from fedsigma.server.runs.run_dir import RunDir

    layout = Layout.from_json((out / "layout.json").read_text(encoding="utf-8"))
    fingerprint = Fingerprint("a" * 64, layout.digest, ((1.0,),) * len(layout.entries))
    study = StudyConfig.from_yaml(STUDY.format(rounds=rounds, strategy=strategy, codec=codec))
    folder = RunDir.create(out / f"run-{os.getpid()}", study.to_yaml())
    grid = RecordedGrid(sites, [upload(out, codec, number) for number in range(uploads)], fingerprint)
    exchange = Messenger(grid)
    roster = SiteManager(exchange, folder, study, fingerprint)
    roster.wait_for_sites()
    federation = Federation(
        study=study,
        site_manager=roster,
        messenger=exchange,
        run_dir=folder,
        aggregator=Aggregator(study),
        partition=ParameterPartition(layout),
        fingerprint=fingerprint,
    )
    shift = np.zeros(layout.size, np.float32)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    took = []
    for number in range(1, rounds + 1):
        start = now() - grid.taken
        outcome = run_round(federation, number, shift)
        assert outcome.shift is not None
        shift = outcome.shift
        checkpoint.save(
            folder,
            federation.aggregator,
            shift,
            study=study,
            split=federation.partition,
            fingerprint=fingerprint,
            round=number,
        )
        took.append((now() - grid.taken - start).tolist())
    seconds, clock, cpu = min(took)
    peak = peak_mb()
    counted = sum(row["status"] == "accepted" for row in folder.rounds())
    assert counted == sites * rounds, f"{counted} of {sites * rounds} replies were accepted"
    found = {"sites": sites, "strategy": strategy, "codec": codec, "seconds": seconds}
    return found | {"clock_s": clock, "cpu_s": cpu, "peak_mb": peak}


def peak_mb() -> float:
    """The most memory that this process has had since its peak was reset."""
    line = next(x for x in Path("/proc/self/status").read_text("ascii").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def child(out: Path, **what: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    call = [sys.executable, "-m", "bench.scale", "--out", str(out), "--measure", json.dumps(what)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every line of the table, and say on the way how far it is."""
    plan = [("fedavg", codec, sites) for codec in options.codecs for sites in sorted(options.sites)]
    plan += [("fedmedian", "exact", sites) for sites in sorted(options.sites) if sites <= options.robust]
    record(options.out, {codec for _, codec, _ in plan}, options.uploads)
    values = Layout.from_json((options.out / "layout.json").read_text(encoding="utf-8")).size
    found: list[dict[str, Any]] = []
    for strategy, codec, sites in plan:
        what = {"rounds": options.rounds, "uploads": options.uploads}
        one = child(options.out, sites=sites, strategy=strategy, codec=codec, **what)
        least = next((x for x in found if (x["strategy"], x["codec"]) == (strategy, codec)), one)
        one |= {"growth_mb": one["peak_mb"] - least["peak_mb"], "disk_mb": sites * 4 * values / 1e6}
        found.append(one)
        print(f"{strategy} {codec} {sites}: {one['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found


def cell(value: Any) -> str:
    """A value of the table, to three digits or a whole number."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def judged(found: list[dict[str, Any]]) -> list[str]:
    """Whether each aim is met, in words."""
    said = []
    for one in found:
        if one["strategy"] == "fedavg" and one["sites"] == 1000:
            met = "met" if one["seconds"] < MOST_SECONDS else "MISSED"
            said.append(f"{met}: {one['codec']}, 1,000 sites: {one['seconds']:.2f} s, aim {MOST_SECONDS:g} s")
        if one["strategy"] == "fedavg" and one["sites"] == 10_000 and one["growth_mb"]:
            met = "met" if one["growth_mb"] < MOST_MB else "MISSED"
            words = f"{one['growth_mb']:.0f} MB more, aim {MOST_MB:g} MB"
            said.append(f"{met}: {one['codec']}, 10,000 sites: {words}")
    return said


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory by the number of sites, a line for each strategy and coding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    drawn = list(dict.fromkeys((one["strategy"], one["codec"]) for one in found))
    # Markers of different sizes, for lines lie on each other.
    looks = zip(("C0", "C1", "0.45", "C2"), (9, 5, 7, 3), strict=True)
    for (strategy, codec), (colour, size) in zip(drawn, looks, strict=False):
        line = [one for one in found if (one["strategy"], one["codec"]) == (strategy, codec)]
        sites, style = [one["sites"] for one in line], "-" if strategy == "fedavg" else "--"
        for axis, key in ((time_axis, "seconds"), (memory_axis, "peak_mb")):
            label = f"{strategy}, {codec}" + ("" if strategy == "fedavg" else " (needs all replies at once)")
            values = [one[key] for one in line]
            axis.plot(sites, values, style, marker="o", markersize=size, color=colour, label=label)
    base = min(one["peak_mb"] for one in found if one["strategy"] == "fedavg")
    time_axis.plot(1000, MOST_SECONDS, "v", color="C3", markersize=9, linestyle="none")
    words, place = f"aim: {MOST_SECONDS:g} s\nat 1,000 sites", (16, -36)
    time_axis.annotate(words, (1000, MOST_SECONDS), place, textcoords="offset points", color="C3")
    memory_axis.axhspan(base, base + MOST_MB, color="C3", alpha=0.12, label=f"aim: {MOST_MB:g} MB more")
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
    """Measure, print the table and say whether the aims are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/scale"), help="for uploads and run folders")
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=["exact", "int8"])
    parser.add_argument("--robust", type=int, default=1000, help="most sites of a strategy that needs all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uploads", type=int, default=64, help="different recorded changes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.measure:
        print(json.dumps(measure(options.out, **options.measure)))
        return
    found = sweep(options)
    print_table(HEADS, [{key: cell(one[key]) for key in HEADS} for one in found])
    for line in judged(found):
        print(line)
    if options.json:
        options.json.write_text(json.dumps({"lines": found}, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
