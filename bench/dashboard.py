"""How long the dashboard takes to open: 100 runs of 200 rounds and 50 sites, in a real browser.

    python -m bench.dashboard --json out/dashboard.json

Writes the runs (synthetic figures), starts `fedsigma dashboard` for each repetition, and opens two pages in
Debian's Chromium: the list of all runs, and the page of one run. Seconds are from the request until the
visible part is drawn; for the run's page also until the charts further down are, which are drawn when the
browser is idle. `first` is the first visit of anyone, `again` the second; the browser's cache is empty both
times.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bench.harness import Table, argument_parser, parse_arguments, write_json
from tests.helpers.browser import MISSING, chromium
from tests.helpers.dashboard_process import dashboard
from tests.helpers.synthetic_run import write_synthetic_run

# Functions, since the pages' policy forbids evaluating text.
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
    """Write run folders: a few different ones, and copies of them, which take as long to read."""
    names = [f"hospital-{number:02d}" for number in range(1, sites + 1)]
    for number in track(range(runs), description="writing runs", console=Console(stderr=True)):
        path = folder / f"study-{number:03d}"
        if number < DIFFERENT:
            write_synthetic_run(path, sites=names, rounds=rounds, seed=number)
        else:
            shutil.copytree(folder / f"study-{number % DIFFERENT:03d}", path)


def measure(folder: Path, *, runs: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Return the median seconds to open each page, by `first` and `again`."""
    times: dict[str, dict[str, list[float]]] = {page: {"first": [], "again": []} for page in PAGES}
    steps = track(range(repetitions), description="opening pages", console=Console(stderr=True))
    with chromium() as browser:
        for _ in steps:
            with dashboard(folder) as (base, link), browser.new_context() as login:
                # Does not follow the redirect to the list, which is to be opened for the first time below.
                login.request.get(link, max_redirects=0)
                state = login.storage_state()
                for visit in ("first", "again"):
                    for names in (("list",), ("run", "run, further down")):
                        with browser.new_context(base_url=base, storage_state=state) as context:
                            page = context.new_page()
                            begin = time.perf_counter()
                            page.goto(PAGES[names[0]][0], wait_until="commit")
                            for name in names:
                                drawn = PAGES[name][1].replace("{runs}", str(runs))
                                page.wait_for_function(drawn, polling="raf")
                                times[name][visit].append(time.perf_counter() - begin)
    return {p: {w: statistics.median(t) for w, t in by_visit.items()} for p, by_visit in times.items()}


def main() -> None:
    """Measure and print."""
    p = argument_parser(__doc__, rounds=200, rounds_help="rounds of each run")
    p.add_argument("--runs", type=int, default=100)
    p.add_argument("--sites", type=int, default=50)
    p.add_argument("--repetitions", type=int, default=5)
    options = parse_arguments(p)
    if MISSING:
        sys.exit(MISSING)
    size = {"runs": options.runs, "rounds": options.rounds, "sites": options.sites}
    with tempfile.TemporaryDirectory(prefix="fedsigma-dashboard-") as folder:
        write_runs(Path(folder), **size)
        seconds = measure(Path(folder), runs=options.runs, repetitions=options.repetitions)
    print(f"{options.runs} runs of {options.rounds} rounds and {options.sites} sites: seconds to open")
    table = Table({"page": "<18", "first": ">6.2f", "again": ">6.2f"})
    table.rows((page, visits["first"], visits["again"]) for page, visits in seconds.items())
    slowest = max(seconds[page]["first"] for page in ("list", "run"))
    print(f"slowest {slowest:.2f} s, aim {LIMIT_S:g} s")
    write_json(options.json, {**size, "seconds": seconds, "slowest_s": slowest, "limit_s": LIMIT_S})


if __name__ == "__main__":
    main()
