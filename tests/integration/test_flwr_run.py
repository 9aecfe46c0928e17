"""The real thing: `flwr run` with Ray, on a tiny random backbone and the demonstration images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedsigma.common.backbones import save_backbone
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import run_in_process
from tests.helpers.tiny_backbones import tiny_clip
from tests.integration.test_end_to_end import GUARDED, STUDY, check_guarded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    backbone = save_backbone(tiny_clip(), tmp_path / "backbone", source="tests")
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(backbone=backbone).replace("round_timeout_s: 60", "round_timeout_s: 300"))
    return file


def command(tmp_path: Path, study: Path, *, resume: bool = False) -> dict[str, Any]:
    """A call of run_simulation in a process of its own: Flower and Ray leave threads behind."""
    call = (
        "import sys, pathlib; from fedsigma.server.simulation.simulate import run_simulation;"
        "sys.exit(run_simulation(sys.argv[1], out=pathlib.Path(sys.argv[2]), resume=sys.argv[3] == '1'))"
    )
    arguments = [sys.executable, "-c", call, str(study), str(tmp_path / "out"), str(int(resume))]
    places = {"FEDSIGMA_CACHE": str(tmp_path / "cache"), "FEDSIGMA_AUDIT": str(tmp_path / "audit")}
    environment = {**os.environ, **places, "PYTHONPATH": str(Path(__file__).parents[2])}
    return {"args": arguments, "env": environment, "cwd": tmp_path, "text": True}


def simulate(tmp_path: Path, study: Path, *, resume: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        **command(tmp_path, study, resume=resume), capture_output=True, timeout=550, check=False
    )


def finished_rounds(out: Path) -> list[int]:
    if not (out / "events.jsonl").is_file():
        return []
    return [e["round"] for e in RunDir.open(out).events() if e["kind"] == "round_end"]


def processes_of(temporary: str) -> list[str]:
    """Command lines of running processes that were started with this folder for temporary files."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("TMPDIR") == temporary:
                found.append(" ".join(process.cmdline())[:200])
    return found


def test_a_guarded_simulation_completes(tmp_path: Path, study: Path) -> None:
    study.write_text(
        GUARDED.format(backbone=tmp_path / "backbone").replace("timeout_s: 60", "timeout_s: 300")
    )
    done = simulate(tmp_path, study)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_guarded(RunDir.open(tmp_path / "out"), tmp_path / "audit")


def test_a_run_that_fails_is_reported_as_failed(tmp_path: Path, study: Path) -> None:
    study.write_text(study.read_text().replace("rounds: 2", "rounds: 2, strategy: fedavgm, options: {x: 1}"))
    done = simulate(tmp_path, study)
    assert done.returncode == 1
    assert "federation.options.x is not an option of fedavgm" in done.stdout
    assert "the run ended as finished:failed" in done.stderr


def end_when(rounds: int, tmp_path: Path, study: Path, *, later: float = 0.0) -> str:
    """Start a run and end it by SIGTERM some seconds after its first `rounds` rounds; return its output.

    Asserts that it was still running and that it leaves no process and no temporary file.
    """
    call, log = command(tmp_path, study), tmp_path / "log"
    # Ray puts sockets there, whose paths may not be long.
    with tempfile.TemporaryDirectory(prefix="fs") as temporary, log.open("w") as output:
        call["env"]["TMPDIR"] = temporary
        with subprocess.Popen(**call, stdout=output, stderr=output) as process:
            deadline = time.monotonic() + 400
            while process.poll() is None and time.monotonic() < deadline:
                if len(finished_rounds(tmp_path / "out")) >= rounds:
                    break
                time.sleep(0.1)
            time.sleep(later)
            assert process.poll() is None, log.read_text()[-3000:]
            process.terminate()
            process.wait(timeout=60)
        assert processes_of(temporary) == []
        assert list(Path(temporary).glob("fedsigma-*")) == []
    return log.read_text()


def test_run_ended_during_local_training_leaves_no_process(tmp_path: Path, study: Path) -> None:
    """There is no message then at whose failure Flower's processes would end by themselves."""
    study.write_text(study.read_text().replace("local_steps: 2", "local_steps: 400"))
    end_when(2, tmp_path, study, later=3)
    assert "local_only" not in RunDir.open(tmp_path / "out").read_summary()


def test_run_ended_by_sigterm_leaves_no_process_and_can_be_resumed(
    tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = 12
    study.write_text(study.read_text().replace("rounds: 2", f"rounds: {rounds}"))
    printed = end_when(1, tmp_path, study)
    before = finished_rounds(tmp_path / "out")
    assert 0 < len(before) < rounds, printed[-3000:]
    done = simulate(tmp_path, study, resume=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    after = finished_rounds(tmp_path / "out")
    assert after[: len(before)] == before and after[-1] == rounds
    # The interrupted round is run again; none is left out.
    assert sorted(set(after)) == list(range(1, rounds + 1))
    check_completed(tmp_path)
    # And it is the same study as in one process, which others are compared with.
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit-alone"))
    monkeypatch.setenv("FEDSIGMA_CACHE", str(tmp_path / "cache"))
    alone = run_in_process(study, tmp_path / "alone", sites=4).load_shift().shift
    assert alone.abs().max() > 0.001
    torch.testing.assert_close(RunDir.open(tmp_path / "out").load_shift().shift, alone, atol=5e-5, rtol=0)


def check_completed(tmp_path: Path) -> None:
    folder = RunDir.open(tmp_path / "out")
    summary = json.loads((folder.path / "summary.json").read_text())
    assert len(summary["sites"]) == 4 and summary["federated"]["accuracy"] is not None
    assert folder.events()[-1]["kind"] == "run_end" and folder.events()[-1]["ok"]
    # The app bundle has what the server's own steps read, and the model is registered.
    assert len(summary["explanation"]) == 8 and all(one["gained"] for one in summary["explanation"])
    assert set(summary["explanation_by_site"]) == set(summary["sites"])
    assert "<h2>Explanation</h2>" in folder.report_path.read_text()
    assert (tmp_path / "models").is_dir()
    # Ray's workers wrote the sites' own logs.
    assert {path.stem for path in (tmp_path / "audit").rglob("*.jsonl")} == set(summary["sites"])
