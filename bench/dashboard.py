"""How long the dashboard takes to open: 100 runs of 200 rounds and 50 sites, in a real browser.

    python -m bench.dashboard [--runs 100] [--rounds 200] [--sites 50] [--json FILE]

Writes the runs (invented figures in the shape of real ones), starts `fedsigma dashboard` anew for each
repetition, and opens in Debian's Chromium the list of all runs, and the page of one run that nobody has
opened before. Counted is from asking for the page to the moment at which all that is seen is drawn; for the
run's page also to that at which the charts further down are, which are drawn when the browser has time.
`first` is the first time that anybody opens the page, `again` the second; the browser's cache is empty both
times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.helpers.browser import MISSING, chromium
from tests.helpers.dashboard_process import dashboard
from tests.helpers.synthetic_run import write_synthetic_run

# Functions, since pages allow no text to be run as a script.
_DRAWN = """() => window.echarts && ['curves', 'participation', 'shift-magnitude', 'updates', 'bytes']
  .map(id => document.getElementById(id)).every(box => box && (SEEN || echarts.getInstanceByDom(box)))"""
PAGES = {
    "list": ("/", "() => document.querySelectorAll('#runs tbody tr').length === {runs}"),
    "run": ("/runs/study-000", _DRAWN.replace("SEEN", "box.getBoundingClientRect().top >= innerHeight")),
    "run, further down": ("/runs/study-000", _DRAWN.replace("SEEN", "false")),
}
LIMIT_S = 1.0
DIFFERENT = 5


def write_runs(folder: Path, *, runs: int, rounds: int, sites: int) -> None:
    """Write the run folders: a few different ones, and copies of their files, which take as long to read."""
    names = [f"hospital-{number:02d}" for number in range(1, sites + 1)]
    for number in track(range(runs), description="writing runs", console=Console(stderr=True)):
        path = folder / f"study-{number:03d}"
        if number < DIFFERENT:
            write_synthetic_run(path, sites=names, rounds=rounds, seed=number)
        else:
            shutil.copytree(folder / f"study-{number % DIFFERENT:03d}", path)


def measure(folder: Path, *, runs: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Median seconds to open each page, by `first` and `again`."""
    times: dict[str, dict[str, list[float]]] = {page: {"first": [], "again": []} for page in PAGES}
    steps = track(range(repetitions), description="opening pages", console=Console(stderr=True))
    with chromium() as browser:
        for _ in steps:
            with dashboard(folder) as (base, link), browser.new_context() as signing:
                # Without following it to the list, whose figures nobody is to have asked for before.
                signing.request.get(link, max_redirects=0)
                state = signing.storage_state()
                for which in ("first", "again"):
                    for names in (("list",), ("run", "run, further down")):
                        with browser.new_context(base_url=base, storage_state=state) as context:
                            page = context.new_page()
                            begin = time.perf_counter()
                            page.goto(PAGES[names[0]][0], wait_until="commit")
                            for name in names:
                                drawn = PAGES[name][1].replace("{runs}", str(runs))
                                page.wait_for_function(drawn, polling="raf")
                                times[name][which].append(time.perf_counter() - begin)
    return {p: {w: statistics.median(t) for w, t in found.items()} for p, found in times.items()}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if MISSING:
        sys.exit(MISSING)
    with tempfile.TemporaryDirectory(prefix="fedsigma-dashboard-") as place:
        folder = Path(place)
        write_runs(folder, runs=options.runs, rounds=options.rounds, sites=options.sites)
        found = measure(folder, runs=options.runs, repetitions=options.repetitions)
    shape = f"{options.runs} runs of {options.rounds} rounds and {options.sites} sites"
    table = Table(title=f"{shape}: seconds to open")
    for head in ("page", "first", "again"):
        table.add_column(head, justify="left" if head == "page" else "right")
    for name, told in found.items():
        table.add_row(name, *(f"{told[which]:.2f}" for which in ("first", "again")))
    Console().print(table)
    slowest = max(found[page]["first"] for page in ("list", "run"))
    Console().print(f"slowest {slowest:.2f} s, wanted below {LIMIT_S:g} s")
    if options.json:
        values: dict[str, Any] = {"runs": options.runs, "rounds": options.rounds, "sites": options.sites}
        values |= {"seconds": found, "slowest_s": slowest, "limit_s": LIMIT_S}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
