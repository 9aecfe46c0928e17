"""A simulation on two Ray nodes, as it would run on two machines; here both are on this one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from fedsigma.common.backbones import save_backbone
from fedsigma.common.ops.supervisor import free_ports
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.tiny_backbones import tiny_clip
from tests.integration.test_end_to_end import STUDY

pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedsigma[simulation]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RAY = Path(sys.executable).parent / "ray"


@contextmanager
def node(*options: str, audit: Path, cache: Path) -> Iterator[None]:
    """A Ray node of one processor that has joined, whose sites write their logs into a folder of its own."""
    environment = {**os.environ, "FEDSIGMA_AUDIT": str(audit), "FEDSIGMA_CACHE": str(cache)}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    environment |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    command = [RAY, "start", *options, "--num-cpus=1", "--block", "--disable-usage-stats"]
    command += ["--object-store-memory=100000000"]
    log = audit.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (told := log.read_text()):  # which is said once it has joined
            assert process.poll() is None and time.monotonic() < deadline, f"no node: {told[-2000:]}"
            time.sleep(0.2)
        yield
    finally:
        # Not `ray stop`, which ends every Ray process of the machine. Its own children by their ids.
        started = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        for one in started:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=30)


def test_a_simulation_uses_the_nodes_of_a_ray_cluster(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    backbone = save_backbone(tiny_clip(), tmp_path / "backbone", source="tests")
    text = STUDY.format(backbone=backbone).replace("round_timeout_s: 60", "round_timeout_s: 300")
    study.write_text(text.replace("[zero_shot, local_only, pooled]", "[]"))
    (port,) = free_ports(1)
    address, audits = f"127.0.0.1:{port}", [tmp_path / "first", tmp_path / "second"]
    with ExitStack() as stack:
        # Ray puts sockets there, whose paths may not be long.
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="fs", ignore_cleanup_errors=True))
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temporary}"]
        stack.enter_context(node(*head, audit=audits[0], cache=tmp_path / "cache"))
        stack.enter_context(node(f"--address={address}", audit=audits[1], cache=tmp_path / "cache"))
        call = (
            "import sys, pathlib; from fedsigma.server.simulation.simulate import run_simulation;"
            "sys.exit(run_simulation(sys.argv[1], out=pathlib.Path(sys.argv[2])))"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_ADDRESS": address}
        done = subprocess.run(
            [sys.executable, "-c", call, str(study), str(tmp_path / "out")],
            env=environment | {"FEDSIGMA_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = RunDir.open(tmp_path / "out").read_summary()
    assert len(summary["sites"]) == 4
    # Each node's sites wrote their logs where that node was told to.
    written = [{path.name for path in audit.rglob("*.jsonl")} for audit in audits]
    assert all(written), f"the sites answered from {[len(names) for names in written]} logs by node"
    assert len(set.union(*written)) == 4
