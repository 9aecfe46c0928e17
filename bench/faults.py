"""What is lost when something fails: one study for each fault, across real processes in network namespaces.

    sudo python -m bench.faults --json out/faults.json

A server (SuperLink, worker, keeper, nginx) and three sites over TLS, each place a network namespace of its
own; a site's worker reaches nothing but its node. While the sites work on round 2 of 3, one thing is broken.
The table says what was lost, whether the run completed, and by how much its shift differs from the
undisturbed study's (meaningful where nothing was lost). The undisturbed study also counts the bytes that
leave each site's namespace against what its audit log says.

Needs root, iproute2 and nginx; faketime for the wrong clock. Takes about forty minutes on two cores.
Exit code 1: something was lost that must not be.
"""

from __future__ import annotations

import argparse
import json
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
    arguments = parsed()
    if reason := missing():
        sys.exit(reason)
    if not may_make_namespaces():
        sys.exit("network namespaces cannot be made here: run it as root, with iproute2 installed")
    names = arguments.only or [name for name in FAULTS if name != "none"]
    result: dict[str, Any] = {"faults": {}}
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
        result["bytes"] = traffic(deployment, before, idle, reference.seconds)
        shift = load_file(latest_shift(deployment))["shift"]
        print_head()
        for name in ["none", *names]:
            fault = FAULTS[name]
            outcome = reference if name == "none" else study_with_fault(deployment, name, fault, study, shift)
            wrong = problems(outcome, fault, tolerance=TOLERANCE) + logs_are_whole(deployment)
            failed |= bool(wrong)
            print_row(outcome, wrong)
            result["faults"][name] = {**asdict(outcome), "what": fault.what, "problems": wrong}
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(result, indent=2) + "\n")
            wait_for(deployment.online, "all sites are online again", 300)
    print_traffic(result["bytes"])
    return int(failed)


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[name for name in FAULTS if name != "none"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A disk of 64 MiB for one site's folder."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def latest_shift(deployment: Deployment) -> Path:
    """The shift of the study that was submitted last."""
    return Path(deployment.submitted()[0]["folder"]) / "sigma.safetensors"


def idle_bytes(deployment: Deployment, seconds: float = 30) -> dict[str, float]:
    """The bytes a second that leave each site while nothing is to be done: asking for work, signs of life."""
    before = {site: deployment.network.bytes_out(site) for site in SITES}
    start = time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - start
    return {site: (deployment.network.bytes_out(site) - before[site]) / spent for site in SITES}


def traffic(
    deployment: Deployment, before: dict[str, tuple[int, int]], idle: dict[str, float], seconds: float
) -> dict[str, Any]:
    """What left each site during the undisturbed study, in bytes."""
    found = {}
    for site in SITES:
        left = deployment.network.bytes_out(site) - before[site][0]
        audited = audited_bytes(deployment, site) - before[site][1]
        polling = idle[site] * seconds
        found[site] = {
            "left": left,
            "audited": audited,
            "idle_per_s": round(idle[site]),
            "seconds": round(seconds),
            "overhead": round(left - audited - polling),
        }
    return found


def print_head() -> None:
    """The head of the table."""
    print(f"{'fault':<12} {'run':<20} {'difference':>10} {'s':>5}  lost", flush=True)


def print_row(outcome: Outcome, wrong: list[str]) -> None:
    """One fault."""
    lost = ", ".join(f"{site} round {number}" for number, site in outcome.lost) or "nothing"
    figures = f"{outcome.difference:>10.1e} {outcome.seconds:>5.0f}"
    print(f"{outcome.fault:<12} {outcome.status:<20} {figures}  {lost}", flush=True)
    for text in [outcome.notes] * bool(outcome.notes) + [f"WRONG: {one}" for one in wrong]:
        print(f"{'':<12} {text}", flush=True)


def print_traffic(told: dict[str, Any]) -> None:
    """The bytes that left each site during the undisturbed study."""
    print(f"\n{'site':<8} {'left':>9} {'in its log':>10} {'asking':>9} {'rest':>8}   (bytes)")
    for site, row in told.items():
        asking = row["idle_per_s"] * row["seconds"]
        print(f"{site:<8} {row['left']:>9} {row['audited']:>10} {asking:>9} {row['overhead']:>8}")


if __name__ == "__main__":
    sys.exit(main())
