"""Runs whose process died are gone on with; runs that ended are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsigma.server.deployment.auto_resume import MAX_ATTEMPTS, resume_crashed_runs
from fedsigma.server.deployment.home import ServerConfig, ServerHome
from fedsigma.server.deployment.studies import Studies
from fedsigma.server.runs.run_dir import RunDir

FAILED = "finished:failed"


class FakeControl:
    """In place of a SuperLink: starts nothing, and says of runs what a test wants."""

    def __init__(self) -> None:
        self.status: dict[str, str] = {}
        self.started: list[dict[str, Any]] = []

    def start(self, app: Path, values: dict[str, Any]) -> str:
        run = str(len(self.started))
        self.started.append(values)
        self.status[run] = "running"
        return run

    def runs(self) -> dict[str, str]:
        return self.status


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def studies(tmp_path: Path, control: FakeControl, monkeypatch: pytest.MonkeyPatch) -> Studies:
    monkeypatch.delenv("FEDSIGMA_DATABASE", raising=False)
    config = ServerConfig(name="Server", address="fl.example.org:443")
    server = ServerHome.create(tmp_path / "server", config, own=None)
    return Studies(server, control)  # type: ignore[arg-type]


def begin(values: dict[str, Any], run: str) -> RunDir:
    """What a ServerApp does first."""
    path = Path(values["out"])
    folder = RunDir.open(path) if values["resume"] else RunDir.create(path, Path(values["study"]).read_text())
    folder.log_event("run_start", study="demo", run=run, resume=values["resume"])
    return folder


def test_crashed_run_is_resumed_once(studies: Studies, control: FakeControl) -> None:
    studies.submit("demo")
    begin(control.started[0], "0").log_event("round_end", round=1, ok=True)
    assert resume_crashed_runs(studies) == []
    control.status["0"] = FAILED
    (made,) = resume_crashed_runs(studies)
    assert made.resumes == "0" and control.started[1]["resume"]
    assert control.started[1]["out"] == control.started[0]["out"]
    assert resume_crashed_runs(studies) == []


def test_failed_or_stopped_run_is_not_resumed(studies: Studies, control: FakeControl) -> None:
    studies.submit("demo")
    begin(control.started[0], "0").log_event("run_end", ok=False, reason="too few sites")
    control.status["0"] = FAILED
    assert resume_crashed_runs(studies) == []
    studies.submit("demo", again=True, seed=5)
    begin(control.started[1], "1")
    control.status["1"] = "finished:stopped"
    assert resume_crashed_runs(studies) == []


def test_run_that_crashed_before_its_start_is_started(studies: Studies, control: FakeControl) -> None:
    studies.submit("demo")
    control.status["0"] = FAILED
    (made,) = resume_crashed_runs(studies)
    assert made.resumes == "0" and not control.started[1]["resume"]
    assert Path(control.started[1]["study"]).is_file()


def test_run_that_crashes_without_progress_is_not_resumed(studies: Studies, control: FakeControl) -> None:
    studies.submit("demo")
    for run in range(MAX_ATTEMPTS):
        begin(control.started[run], str(run))
        control.status[str(run)] = FAILED
        assert len(resume_crashed_runs(studies)) == (run + 1 < MAX_ATTEMPTS)
    assert resume_crashed_runs(studies) == []


def test_watcher_of_a_crashed_run_follows_the_resumed_one(
    studies: Studies, control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsigma.server.deployment.studies.POLL_S", 0.01)
    studies.submit("demo")
    begin(control.started[0], "0")
    seen = []
    for one in studies.watch("demo"):
        seen.append((one.submission.run_id, one.status))
        if len(seen) == 1:
            control.status["0"] = FAILED
        elif len(seen) == 4:
            resume_crashed_runs(studies)
        elif one.submission.run_id == "1":
            control.status["1"] = "finished:completed"
    assert seen[:2] == [("0", "running"), ("0", FAILED)]
    assert seen[-2:] == [("1", "running"), ("1", "finished:completed")]
