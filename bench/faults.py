"""The effect of failures: one study for each fault, across real processes in network namespaces.

    sudo python -m bench.faults --json out/faults.json

A server (SuperLink, worker, auto-resume, nginx) and three sites over TLS, each in a network namespace of its
own; a site's worker reaches only its node. While the sites work on round 2 of 3, one fault happens. The table
says what was lost, whether the run completed, and the difference of its shift from the undisturbed study's
(meaningful where nothing was lost). The undisturbed study also counts the bytes that leave each site's
namespace against those in its audit log.

Needs root, iproute2 and nginx; faketime for the wrong clock. Takes about forty minutes on two cores.
Exit code 1: something was lost that must not be.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from bench.harness import Table, argument_parser, parse_arguments, write_json
from tests.deployment.faults import (
    FAULTS,
    HIT,
    Outcome,
    audited_bytes,
    logs_are_whole,
    problems,
    study_file,
    study_with_fault,
)
from tests.deployment.network import may_make_namespaces
from tests.deployment.parts import SITES, Deployment, deployed, missing, wait_for

TOLERANCE = 5e-5
"""Of a shift whose largest values are about 0.06: sums of floats depend on the order of replies."""


def main() -> int:
    """Run the faults and print the table."""
    p = argument_parser(__doc__)
    p.add_argument("--only", nargs="+", choices=[name for name in FAULTS if name != "none"])
    options = parse_arguments(p)
    if reason := missing():
        sys.exit(reason)
    if not may_make_namespaces():
        sys.exit("network namespaces cannot be created: run as root, with iproute2 installed")
    names = options.only or [name for name in FAULTS if name != "none"]
    figures: dict[str, Any] = {"faults": {}}
    failed = False
    with (
        tempfile.TemporaryDirectory(prefix="fedsigma-faults-") as folder,
        small_disk(Path(folder) / HIT),
        deployed(Path(folder), later=["west"]) as deployment,
    ):
        study = study_file(Path(folder))
        idle = idle_bytes(deployment)
        before = {
            site: (deployment.network.bytes_out(site), audited_bytes(deployment, site)) for site in SITES
        }
        reference = study_with_fault(deployment, "none", FAULTS["none"], study, None)
        figures["bytes"] = traffic(deployment, before, idle, reference.seconds)
        shift = load_file(latest_shift(deployment))["shift"]
        table = Table({"fault": "<12", "run": "<20", "difference": ">10.1e", "s": ">5.0f", " lost": "<"})
        for name in ["none", *names]:
            fault = FAULTS[name]
            outcome = reference if name == "none" else study_with_fault(deployment, name, fault, study, shift)
            wrong = problems(outcome, fault, tolerance=TOLERANCE) + logs_are_whole(deployment)
            failed |= bool(wrong)
            print_row(table, outcome, wrong)
            figures["faults"][name] = {**asdict(outcome), "what": fault.what, "problems": wrong}
            write_json(options.json, figures)
            wait_for(deployment.online, "all sites are online again", 300)
    print_traffic(figures["bytes"])
    return int(failed)


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """Mount a disk of 64 MiB for one site's folder."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def latest_shift(deployment: Deployment) -> Path:
    """Return the file of the shift of the study that was submitted last."""
    return Path(deployment.submitted()[0]["folder"]) / "sigma.safetensors"


def idle_bytes(deployment: Deployment, seconds: float = 30) -> dict[str, float]:
    """Return the bytes a second that leave each site while nothing runs: polling for work, heartbeats."""
    before = {site: deployment.network.bytes_out(site) for site in SITES}
    start = time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - start
    return {site: (deployment.network.bytes_out(site) - before[site]) / spent for site in SITES}


def traffic(
    deployment: Deployment, before: dict[str, tuple[int, int]], idle: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Return the bytes that left each site during the undisturbed study."""
    figures = {}
    for site in SITES:
        left = deployment.network.bytes_out(site) - before[site][0]
        audited = audited_bytes(deployment, site) - before[site][1]
        polling = idle[site] * seconds
        figures[site] = {
            "left": left,
            "audited": audited,
            "idle_per_s": round(idle[site]),
            "seconds": round(seconds),
            "overhead": round(left - audited - polling),
        }
    return figures


def print_row(table: Table, outcome: Outcome, wrong: list[str]) -> None:
    """Print one fault, its notes and its problems."""
    lost = ", ".join(f"{site} round {number}" for number, site in outcome.lost) or "nothing"
    table.row(outcome.fault, outcome.status, outcome.difference, outcome.seconds, f" {lost}")
    for text in [outcome.notes] * bool(outcome.notes) + [f"WRONG: {problem}" for problem in wrong]:
        print(f"{'':<12} {text}", flush=True)


def print_traffic(traffic: dict[str, Any]) -> None:
    """Print the bytes that left each site during the undisturbed study."""
    print("\nbytes")
    table = Table({"site": "<8", "left": ">9", "in its log": ">10", "polling": ">9", "rest": ">8"})
    for site, row in traffic.items():
        polling = row["idle_per_s"] * row["seconds"]
        table.row(site, row["left"], row["audited"], polling, row["overhead"])


if __name__ == "__main__":
    sys.exit(main())
