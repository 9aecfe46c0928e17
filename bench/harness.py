"""What all benchmark scripts share: command-line options, the JSON file of figures, tables, timing, memory.

Scripts are modules: `python -m bench.step --help`, from the project's folder. Each prints a table and, with
`--json FILE`, writes its figures together with the facts of the machine that they were measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REQUIRED = "required"
PACKAGES = ("fedsigma", "torch", "flwr", "open_clip_torch", "numpy")
DATA_HELP = "folder of wbc_labs.parquet and ham10000_sites.parquet (columns image, label, site, group, split)"


def argument_parser(
    doc: str | None,
    *,
    data: str | None = None,
    out: str | None = None,
    seeds: Sequence[int] | None = None,
    rounds: int | None = None,
    rounds_help: str = "rounds of each study",
) -> argparse.ArgumentParser:
    """Return a parser with `--json` and the common options for which a value is given.

    Args:
        doc: The script's docstring, which `--help` prints.
        data: `REQUIRED`, or the help text of an optional `--data`.
        out: `REQUIRED`, or the default folder of `--out`.
        seeds: Default of `--seeds`.
        rounds: Default of `--rounds`.
        rounds_help: Help text of `--rounds`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data is not None:
        text = DATA_HELP if data == REQUIRED else data
        parser.add_argument("--data", type=Path, required=data == REQUIRED, metavar="DIR", help=text)
    if out is not None:
        default = None if out == REQUIRED else Path(out)
        text = "folder of the runs; finished runs in it are not repeated, interrupted ones are resumed"
        parser.add_argument(
            "--out", type=Path, required=out == REQUIRED, default=default, metavar="DIR", help=text
        )
    if seeds is not None:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="N")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help=rounds_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, create `--out`, and pass `--data` to the studies as $FEDSIGMA_DATA."""
    options = parser.parse_args()
    if getattr(options, "data", None):
        os.environ["FEDSIGMA_DATA"] = str(options.data.resolve())
    if getattr(options, "out", None):
        options.out = options.out.resolve()
        options.out.mkdir(parents=True, exist_ok=True)
    return options


def machine_facts() -> dict[str, Any]:
    """Return processor, cores, memory in GiB, versions of the main packages, commit and time."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Return the commit of this checkout, marked if files differ from it; None for no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures and the machine's facts; do nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**figures, "machine": machine_facts()}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


class Table:
    """A table that is printed row by row.

    Args:
        columns: Heading and format of each column, such as `{"site": "<12", "seconds": ">9.2f"}`. Text and
            None (printed as nothing) use the format's alignment and width alone.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._formats = list(columns.values())
        self.row(*columns)

    def row(self, *cells: object) -> None:
        """Print one row."""
        pairs = zip(cells, self._formats, strict=True)
        print(" ".join(_format(cell, spec) for cell, spec in pairs).rstrip(), flush=True)

    def rows(self, rows: Iterable[Sequence[object]]) -> None:
        """Print several rows."""
        for row in rows:
            self.row(*row)


def _format(cell: object, spec: str) -> str:
    if cell is None or isinstance(cell, str):
        width = "".join(c for c in spec[1:].partition(".")[0] if c.isdigit())
        return format(cell or "", spec[0] + width)
    return format(cell, spec)


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the median seconds of several calls."""
    return statistics.median(timed(call) for _ in range(repeats))


def alternate(
    first: Callable[[], object], second: Callable[[], object], repeats: int = 1
) -> tuple[list[float], list[float]]:
    """Time two calls in the order A B B A, so that other work on the machine slows both.

    Returns:
        The seconds of each call: two for each repeat.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in (0, 1, 1, 0) * repeats:
        seconds[index].append(timed((first, second)[index]))
    return seconds


def reset_peak() -> None:
    """Let `peak_mib` count from here; Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB; Linux only.

    Not getrusage's ru_maxrss, which a child process inherits from its parent.
    """
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
