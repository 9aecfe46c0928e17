"""Faults for a running study, one at a time, and what was lost by each.

A fault is caused while the sites work on round 2. What may be lost is the affected site's part of a round,
and where the fault lasts, of the rounds that it lasts; what else is lost is a defect.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fedsigma.common.ops.supervisor import call
from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.server.deployment.certificates import issue_certificate
from fedsigma.server.runs.run_dir import RunDir
from tests.deployment.network import SERVER
from tests.deployment.parts import BIN, SITES, STUDY, Deployment, reached, wait_for

ROUNDS = 3
HIT = "north"
"""The site that faults of one site hit."""


@dataclass(frozen=True)
class Outcome:
    """What came of a study with a fault.

    Fields: fault; status, Flower's word for the run's end; lost, the (round, site) without an accepted reply;
    judged, the sites that evaluated the final model; difference, the largest from the undisturbed study's
    shift; seconds; notes, what else was seen.
    """

    fault: str
    status: str
    lost: list[tuple[int, str]]
    judged: list[str]
    difference: float
    seconds: float
    notes: str = ""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Fields: what, in words; cause, called while the sites work on round 2; before and after the study, to
    prepare and to heal; may_lose, the (round, site) that may be lost; absent, sites that need not evaluate
    the final model; while_busy, the site that must be at work when it is caused; adds_a_site, so that the
    shift cannot be the undisturbed study's.
    """

    what: str
    cause: Callable[[Deployment, RunDir], str | None]
    before: Callable[[Deployment], None] = lambda deployment: None
    after: Callable[[Deployment], None] = lambda deployment: None
    may_lose: frozenset[tuple[int, str]] = frozenset()
    absent: frozenset[str] = frozenset()
    while_busy: str = HIT
    adds_a_site: bool = False


def parts(site: str, *rounds: int) -> frozenset[tuple[int, str]]:
    """A site's parts of some rounds."""
    return frozenset((number, site) for number in rounds)


def study_with_fault(
    deployment: Deployment, name: str, fault: Fault, study: Path, reference: NDArray[Any] | None
) -> Outcome:
    """Run a study, cause the fault, and see what was lost."""
    started = time.monotonic()
    fault.before(deployment)
    try:
        _, folder = deployment.submit(study, "--again")
        wait_for(lambda: reached(folder, 2) and deployment.busy(fault.while_busy), f"{name} in round 2", 300)
        notes = fault.cause(deployment, folder) or ""
        status = wait_for(lambda: ended(deployment, folder), f"{name}: the study ends", 900)
    finally:
        fault.after(deployment)
    rows = {(r["round"], r["site"]) for r in folder.rounds() if r["status"] == "accepted"}
    lost = sorted({(number, s) for number in range(1, ROUNDS + 1) for s in SITES} - rows)
    shift = load_file(folder.path / "sigma.safetensors")["shift"]
    difference = float(np.abs(shift - reference).max()) if reference is not None else 0.0
    judged = sorted(site for number, site in rows if number == ROUNDS + 1)
    return Outcome(name, status, lost, judged, difference, time.monotonic() - started, notes)


def problems(outcome: Outcome, fault: Fault, *, tolerance: float) -> list[str]:
    """What is wrong with an outcome; nothing if only what may be lost was lost."""
    found = []
    if outcome.status != "finished:completed":
        found.append(f"the run is {outcome.status}")
    if more := set(outcome.lost) - fault.may_lose:
        found.append(f"lost besides: {sorted(more)}")
    if away := set(SITES) - fault.absent - set(outcome.judged):
        found.append(f"not there at the end: {sorted(away)}")
    if not outcome.lost and not fault.adds_a_site and outcome.difference > tolerance:
        found.append(f"nothing lost, and the shift differs by {outcome.difference:.2g}")
    return found


def ended(deployment: Deployment, folder: RunDir) -> str:
    """How a run ended; one that died or was stopped is not over, since it is gone on with."""
    if not any(e["kind"] == "run_end" for e in folder.events()[-1:]):
        return ""
    return deployment.ended(folder)


def logs_are_whole(deployment: Deployment) -> list[str]:
    """Verify every log by the command; returns what it says of those that are not whole."""
    files = [deployment.server.path / "audit.jsonl"]
    mine = [site.path / "worker" / "audit.jsonl" for site in deployment.sites.values()]
    # A site that has just joined has neither a log nor its head; a head alone is a log that was removed.
    files += [file for file in mine if file.exists() or file.with_name("audit.jsonl.head").exists()]
    done = [deployment.run(SERVER, "audit", "verify", file, check=False) for file in files]
    return [one.stdout + one.stderr for one in done if one.returncode]


def audited_bytes(deployment: Deployment, site: str) -> int:
    """The bytes that a site's log says have left it."""
    lines = HashChainedLog(deployment.sites[site].path / "worker" / "audit.jsonl").lines()
    return sum(line["reply"]["bytes"] for line in lines)


# The faults


def _worker(deployment: Deployment, folder: RunDir) -> None:
    for pid in [*deployment.busy(HIT), deployment.pid(HIT, "worker")]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _node(deployment: Deployment, folder: RunDir) -> None:
    deployment.kill(HIT, "node")


def _superlink(deployment: Deployment, folder: RunDir) -> None:
    deployment.kill(SERVER, "superlink")


def _proxy(deployment: Deployment, folder: RunDir) -> None:
    deployment.kill(SERVER, "proxy")


def _server_worker(deployment: Deployment, folder: RunDir) -> None:
    deployment.kill(SERVER, "worker")


def _down(deployment: Deployment, folder: RunDir) -> None:
    deployment.stop(SERVER)
    time.sleep(120)
    deployment.start(SERVER)


def _cut(deployment: Deployment, folder: RunDir) -> None:
    deployment.network.cut(HIT)
    time.sleep(30)
    deployment.network.heal(HIT)


def _full_disk(deployment: Deployment, folder: RunDir) -> str:
    ballast = deployment.sites[HIT].path / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(65536))
    free = shutil.disk_usage(ballast).free
    wait_for(lambda: _round_over(folder, 2), "round 2 ends", 400)
    ballast.unlink()
    return f"{free} bytes were free"


def _wrong_clock(deployment: Deployment, folder: RunDir) -> str:
    site = deployment.sites[HIT]
    call(site.path, "supervisor.stopProcess", "node", True)
    command = [*deployment.network.inside(HIT), "faketime", "-f", "+600s"]
    command += [str(BIN / "fedsigma"), "site", "up", "--only", "node", "-f", str(site.path)]
    log = site.path / "logs" / "node.log"
    with log.open("ab") as file:
        node = subprocess.Popen(command, env=deployment.environment, stdout=file, stderr=file)
    try:
        doctor = [*deployment.network.inside(HIT), "faketime", "-f", "+600s", str(BIN / "fedsigma"), "site"]
        doctor += ["doctor", "--quick", "--json", "-f", str(site.path)]
        told = subprocess.run(doctor, env=deployment.environment, capture_output=True, text=True, check=False)
        found = {one["check"]: one for one in json.loads(told.stdout)}
        wait_for(lambda: _round_over(folder, 2), "round 2 ends", 400)
    finally:
        node.terminate()
        code = node.wait(timeout=60)
    call(site.path, "supervisor.startProcess", "node", False)
    return f"the node ended with {code}; the doctor: {found['clock']['seen']}, {found['key']['seen']}"


def _expired(deployment: Deployment, folder: RunDir) -> None:
    server = deployment.server
    host = deployment.network.server
    issue_certificate(server.authority(), [host], days=0).write(
        server.tls("outer.crt"), server.tls("outer.key")
    )
    deployment.kill(SERVER, "proxy")
    time.sleep(30)
    deployment.run(SERVER, "server", "rotate", "certificate", "-f", server.path)


def _revoked(deployment: Deployment, folder: RunDir) -> str:
    deployment.run(SERVER, "server", "revoke", HIT, "-f", deployment.server.path)
    time.sleep(5)
    site = deployment.sites[HIT].path
    told = deployment.run(HIT, "site", "doctor", "--quick", "--json", "-f", site, check=False)
    return "the doctor: " + next(one["detail"] for one in json.loads(told.stdout) if one["check"] == "key")


def _come_back(deployment: Deployment) -> None:
    """Have a site that was shut out join again, with new keys."""
    deployment.stop(HIT)
    old = deployment.sites[HIT].path
    kept = old.parent / f"{HIT}-revoked"
    # The folder may be a mount of its own, which cannot be renamed.
    shutil.copytree(old, kept, ignore=shutil.ignore_patterns("*.sock"))
    for item in old.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    for name in (f"{HIT}.join.json", f"{HIT}.keys.json"):
        (old.parent / name).unlink()
    deployment.admit(HIT)
    deployment.start(HIT)


def _other_backbone(deployment: Deployment) -> None:
    from fedsigma.common.backbones import starter_folder
    from fedsigma.common.backbones.bundle import sha256

    place = deployment.server.path.parent / "other-backbone"
    if not place.exists():
        shutil.copytree(starter_folder(), place)
        weights = place / "open_clip_model.safetensors"
        tensors = load_file(weights)
        name = next(n for n, t in sorted(tensors.items()) if n.endswith("attn.in_proj_weight"))
        save_file({**tensors, name: tensors[name] * np.float16(1.01)}, weights)
        manifest = json.loads((place / "fedsigma_backbone.json").read_text())
        manifest["files"][weights.name] = sha256(weights)
        (place / "fedsigma_backbone.json").write_text(json.dumps(manifest))
    _set(deployment, "starter: starter", f"starter: local-dir:{place}")


def _right_backbone(deployment: Deployment) -> None:
    place = deployment.server.path.parent / "other-backbone"
    _set(deployment, f"starter: local-dir:{place}", "starter: starter")


def _other_approved(deployment: Deployment) -> None:
    (digest,) = deployment.sites[HIT].read_policy().bundles
    _set(deployment, digest, "f" * 64)


def _approve(deployment: Deployment, folder: RunDir) -> str:
    refused = [e["reason"] for e in folder.events() if e["kind"] == "site_refused"]
    deployment.run(HIT, "site", "approve", "--yes", "-f", deployment.sites[HIT].path)
    return f"the server was told: {refused[0]}"


def _late(deployment: Deployment, folder: RunDir) -> str:
    deployment.admit("west")
    deployment.start("west")
    wait_for(lambda: deployment.online(["west"]), "the late site is online")
    begun = max(e["round"] for e in folder.events() if e["kind"] == "round_start")
    return f"online in round {begun}"


def _damaged(deployment: Deployment, folder: RunDir) -> str:
    wait_for(lambda: reached(folder, 3), "round 3 begins", 300)
    run = next(one["run"] for one in deployment.submitted() if one["folder"] == str(folder.path))
    deployment.run(SERVER, "study", "stop", run, "-f", deployment.server.path)
    file = folder.path / "sigma.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x80
    file.write_bytes(content)
    deployment.run(SERVER, "study", "resume", run, "-f", deployment.server.path)
    wait_for(lambda: any(e["kind"] == "checkpoint_damaged" for e in folder.events()), "it goes on", 120)
    return "went on from the round before"


def _nothing(deployment: Deployment, folder: RunDir) -> None:
    return None


def _set(deployment: Deployment, old: str, new: str) -> None:
    file = deployment.sites[HIT].path / "site.yaml"
    text = file.read_text()
    assert old in text, text
    file.write_text(text.replace(old, new))


def _round_over(folder: RunDir, number: int) -> bool:
    return any(e["kind"] == "round_end" and e["round"] >= number for e in folder.events())


FAULTS: Mapping[str, Fault] = {
    "none": Fault("nothing", _nothing),
    "worker": Fault("kill -9 of a site's worker", _worker, may_lose=parts(HIT, 2)),
    "node": Fault("kill -9 of a site's node", _node, may_lose=parts(HIT, 2)),
    "superlink": Fault("kill -9 of the SuperLink", _superlink),
    "server": Fault("kill -9 of the server's worker", _server_worker),
    "proxy": Fault("kill -9 of the proxy", _proxy),
    "down": Fault("the whole server down for two minutes", _down),
    "cut": Fault("a site's network cut for 30 s", _cut, may_lose=parts(HIT, 2)),
    "disk": Fault("a site's disk full until the round ends", _full_disk, may_lose=parts(HIT, 2, 3)),
    "clock": Fault("a site's clock ten minutes ahead for the round", _wrong_clock, may_lose=parts(HIT, 2, 3)),
    "certificate": Fault("the server's certificate expired for 30 s", _expired),
    "backbone": Fault(
        "another backbone at one site",
        _nothing,
        before=_other_backbone,
        after=_right_backbone,
        may_lose=parts(HIT, 1, 2, 3),
        absent=frozenset({HIT}),
        while_busy="east",
    ),
    "bundle": Fault(
        "an app bundle that a site has not approved",
        _approve,
        before=_other_approved,
        may_lose=parts(HIT, 1, 2, 3),
        absent=frozenset({HIT}),
        while_busy="east",
    ),
    "checkpoint": Fault("the last checkpoint damaged, while the run is stopped", _damaged),
    "revoked": Fault(
        "a site's key revoked",
        _revoked,
        after=_come_back,
        may_lose=parts(HIT, 2, 3),
        absent=frozenset({HIT}),
    ),
    "late": Fault("a fourth site joins during the study", _late, adds_a_site=True),
}


def study_file(folder: Path) -> Path:
    """Write the study that all faults are tried on."""
    path = folder / "faults.yaml"
    path.write_text(STUDY.replace("rounds: 2", f"rounds: {ROUNDS}").replace("240", "150"))
    return path
