"""Experiment trackers, without their libraries: what they are told, and that they cannot harm a run."""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.study import load_study
from fedsigma.server.deployment.auto_resume import resume_crashed_runs
from fedsigma.server.deployment.studies import Studies
from fedsigma.server.federation.site_manager import WrongSiteCount
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.trackers import TrackerCallback, TrackerError, callback, config, parse_trackers, worker
from fedsigma.server.trackers.base import TrackedRun
from fedsigma.server.trackers.metric_names import final_metrics, flatten_parameters, row_metrics, safe_name
from tests.helpers.fake_trainer import NAMES, fake_method  # noqa: F401
from tests.integration.test_rounds import events, run
from tests.unit.test_auto_resume import FAILED, FakeControl, begin, control, studies  # noqa: F401
from tests.unit.test_run_dir import STUDY as SMALL


class FakeTracker:
    """A tracker that records its calls."""

    def __init__(self) -> None:
        self.runs: list[TrackedRun] = []
        self.keys: list[str] = []
        self.numbers: dict[tuple[int, str], float] = {}
        self.results: dict[str, float] = {}
        self.tags: dict[str, str] = {}
        self.files: list[str] = []
        self.outcomes: list[str] = []

    def start(self, run: TrackedRun, key: str) -> str:
        self.runs.append(run)
        self.keys.append(key)
        return key or "its-own-id"

    def log_metrics(self, values: dict[str, float], *, round: int) -> None:
        self.numbers |= {(round, name): value for name, value in values.items()}

    def log_final(self, values: dict[str, float]) -> None:
        self.results = values

    def set_tag(self, name: str, value: str) -> None:
        self.tags[name] = value

    def log_file(self, path: Path) -> None:
        self.files.append(path.name)

    def close(self, outcome: str) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put trackers in place of the libraries'; nothing has to be installed for them."""

    def put(**trackers: Any) -> None:
        monkeypatch.setattr(callback, "open_tracker", lambda name: trackers[name])
        monkeypatch.setattr(config, "_check", lambda name: None)
        monkeypatch.setenv("FEDSIGMA_TRACKERS", ",".join(trackers))

    return put


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", SMALL)


def follow(folder: RunDir, names: str) -> TrackerCallback:
    return TrackerCallback(folder, parse_trackers(names), study=load_study("demo"), run="7")


# ---- a whole run


@pytest.mark.usefixtures("fake_method")
def test_trackers_receive_settings_rounds_results_and_files(tmp_path: Path, use: Callable) -> None:
    heard = FakeTracker()
    use(wandb=heard)
    folder = run(tmp_path)
    (told,) = heard.runs
    assert told.name == "out" and told.folder == tmp_path / "out" / "trackers" / "wandb"
    assert told.parameters["federation.rounds"] == "3" and told.parameters["classes"] == "a, b"
    assert told.tags["study"] == "fake" and told.tags["run"] == "1" and told.tags["fedsigma_version"]
    for row in folder.rounds():
        where = "all_sites" if row["site"] == ALL_SITES else f"site/{row['site']}"
        assert heard.numbers[row["round"], f"{where}/accuracy"] == row["accuracy"]
        if row["site"] != ALL_SITES and row["round"] < 4:
            assert heard.numbers[row["round"], f"{where}/bytes_up"] == row["bytes_up"] > 0
            assert heard.numbers[row["round"], f"{where}/loss"] == row["loss"]
    summary = folder.read_summary()
    assert heard.results["final/federated/accuracy"] == summary["federated"]["accuracy"]
    assert heard.results["final/local_only/everywhere"] == summary["local_only"]["everywhere"]
    assert {f"final/federated/site/{name}" for name in NAMES} <= set(heard.results)
    # The report is written after the run's end, and is there all the same; the sigma file was not asked for.
    assert heard.files == ["study.yaml", "report.html"] and heard.outcomes == ["finished"]
    assert heard.tags == {"model": events(folder, "published")[0]["model"]}
    assert not events(folder, "tracker_failed")


@pytest.mark.usefixtures("fake_method")
def test_failed_run_is_reported_as_failed(tmp_path: Path, use: Callable) -> None:
    heard = FakeTracker()
    use(mlflow=heard)
    with pytest.raises(WrongSiteCount):
        run(tmp_path, sites=1)
    assert heard.outcomes == ["failed"] and heard.results == {}


def test_the_sigma_file_goes_only_where_it_was_asked_for(folder: RunDir, use: Callable) -> None:
    with_sigma, without = FakeTracker(), FakeTracker()
    use(mlflow=with_sigma, wandb=without)
    (folder.path / "sigma.safetensors").write_bytes(b"sigma")
    follow(folder, "mlflow+sigma,wandb").close()
    assert (with_sigma.files, without.files) == (["study.yaml", "sigma.safetensors"], ["study.yaml"])


# ---- no harm


class Raising(FakeTracker):
    """Raises in the named methods."""

    def __init__(self, *methods: str, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        for method in methods:
            setattr(self, method, self._no)
        self._error = error

    def _no(self, *args: object, **kwargs: object) -> str:
        raise self._error("token=hunter2 at /secret/path")


@pytest.mark.usefixtures("fake_method")
@pytest.mark.parametrize(
    ("methods", "error"),
    [
        (("start",), RuntimeError),
        (("log_metrics", "log_final", "set_tag", "log_file", "close"), RuntimeError),
        (("log_metrics",), SystemExit),
        (("close",), KeyboardInterrupt),
    ],
)
def test_failing_tracker_is_logged_once_and_the_run_continues(
    tmp_path: Path, use: Callable, methods: tuple[str, ...], error: type[BaseException]
) -> None:
    sound = FakeTracker()
    use(mlflow=Raising(*methods, error=error), tensorboard=sound)
    folder = run(tmp_path)
    (noted,) = events(folder, "tracker_failed")
    assert {name: noted[name] for name in ("tracker", "error")} == {
        "tracker": "mlflow",
        "error": error.__name__,
    }
    assert "secret" not in (folder.path / "events.jsonl").read_text()
    assert events(folder, "run_end")[0]["ok"] and sound.outcomes == ["finished"]


def test_calls_after_an_error_are_executed(folder: RunDir, use: Callable) -> None:
    patchy = Raising("log_metrics")
    use(mlflow=patchy)
    following = follow(folder, "mlflow")
    folder.log_round(1, "a", {"accuracy": 0.5}, 1, 1, "accepted")
    folder.log_event("run_end", ok=True, reason="")
    following.close()
    assert patchy.outcomes == ["finished"]


class Hanging(FakeTracker):
    """Answers nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def start(self, run: TrackedRun, key: str) -> str:
        self.let_go.wait()
        return super().start(run, key)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    one = Hanging()
    yield one
    one.let_go.set()


@pytest.mark.usefixtures("fake_method")
def test_hanging_tracker_delays_neither_the_run_nor_others(
    tmp_path: Path, use: Callable, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = FakeTracker()
    monkeypatch.setattr(callback, "CLOSE_TIMEOUT_S", 0.3)
    use(mlflow=hanging, wandb=sound)
    folder = run(tmp_path)
    (noted,) = events(folder, "tracker_failed")
    assert (noted["tracker"], noted["error"]) == ("mlflow", "TimeoutError")
    # Everything else was written before the tracker was given up.
    assert folder.events()[-1] == noted and folder.report_path.is_file()
    assert sound.outcomes == ["finished"] and hanging.numbers == {}


def test_queue_is_bounded(
    folder: RunDir, use: Callable, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "MAX_QUEUED", 5)
    monkeypatch.setattr(callback, "CLOSE_TIMEOUT_S", 0.1)
    use(mlflow=hanging)
    following = follow(folder, "mlflow")
    put, waited = queue.Queue.put, []

    def watched(self: Any, item: Any, block: bool = True, timeout: float | None = None) -> None:
        waited.append(block)
        put(self, item, block, timeout)

    monkeypatch.setattr(queue.Queue, "put", watched)
    for number in range(100):
        folder.log_round(number, "a", {"accuracy": 0.5}, 1, 1, "accepted")
    assert len(folder.rounds()) == 100 and waited == [False] * 6
    following.close()
    assert [event["error"] for event in events(folder, "tracker_failed")] == ["Full"]


def test_a_listener_of_the_run_itself_still_stops_it(folder: RunDir, use: Callable) -> None:
    heard, seen = FakeTracker(), []
    use(mlflow=heard)

    def listener(event: dict[str, Any]) -> None:
        seen.append(event["kind"])
        if event["kind"] == "round_end":
            raise OSError("the disk is full")

    folder.listen(listener)
    following = follow(folder, "mlflow")
    folder.log_event("round_start", round=1)
    with pytest.raises(OSError, match="disk is full"):
        folder.log_event("round_end", round=1)
    folder.log_event("run_end", ok=False, reason="")
    following.close()
    assert seen == ["round_start", "round_end", "run_end"] and heard.outcomes == ["failed"]


def test_several_listeners_hear_rows_after_they_were_written(folder: RunDir) -> None:
    heard: list[tuple[str, int, int]] = []
    for name in ("first", "second"):
        folder.listen(
            row=lambda row, name=name: heard.append((name, row["round"], len(folder.rounds())))  # type: ignore[misc]
        )
    folder.log_round(1, "a", {}, 0, 0, "late")
    folder.log_event("round_end", round=1)
    assert heard == [("first", 1, 1), ("second", 1, 1)]


# ---- resuming


def test_resumed_run_keeps_its_trackers_and_keys(folder: RunDir, use: Callable) -> None:
    first, second = FakeTracker(), FakeTracker()
    use(mlflow=first)
    follow(folder, "mlflow+sigma").close()
    assert first.keys == [""] and first.outcomes == ["interrupted"]
    use(mlflow=second, wandb=FakeTracker())
    (folder.path / "sigma.safetensors").write_bytes(b"sigma")
    follow(RunDir.open(folder.path), "wandb").close()
    assert second.keys == ["its-own-id"] and "sigma.safetensors" in second.files


def test_resumed_run_retries_an_unreachable_tracker(folder: RunDir, use: Callable) -> None:
    back = FakeTracker()
    use(mlflow=Raising("start"))
    follow(folder, "mlflow").close()
    use(mlflow=back)
    follow(folder, "").close()
    assert back.keys == [""] and back.outcomes


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 3}', "\xff"])
def test_damaged_state_file_starts_a_new_record(folder: RunDir, use: Callable, content: str) -> None:
    heard = FakeTracker()
    use(mlflow=heard)
    (folder.path / "trackers").mkdir()
    (folder.path / "trackers" / "mlflow.json").write_bytes(content.encode("latin-1"))
    follow(folder, "mlflow").close()
    assert heard.keys == [""]
    assert json.loads((folder.path / "trackers" / "mlflow.json").read_text())["key"] == "its-own-id"


# ---- choosing


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mlflw", "trackers is 'mlflw', expected one of mlflow, tensorboard, wandb"),
        ("neptune", "trackers is 'neptune', expected one of mlflow, tensorboard, wandb"),
        ("tensorboard+sigma", "tensorboard stores no files: remove +sigma"),
    ],
)
def test_unknown_trackers_are_rejected(text: str, words: str) -> None:
    with pytest.raises(TrackerError, match=re.escape(words)):
        parse_trackers(text)


def test_trackers_come_from_the_run_and_from_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_check", lambda name: None)
    monkeypatch.setenv("FEDSIGMA_TRACKERS", "wandb+sigma, mlflow")
    named = config.choose_trackers("tensorboard,mlflow+sigma")
    assert {(one.name, one.with_shift) for one in named} == {
        ("wandb", True),
        ("mlflow", True),
        ("tensorboard", False),
    }
    monkeypatch.setenv("FEDSIGMA_TRACKERS", "wandbb")
    with pytest.raises(TrackerError, match="FEDSIGMA_TRACKERS is 'wandbb'"):
        config.choose_trackers("")


def test_missing_requirements_are_reported_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIGMA_TRACKERS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(config, "find_spec", lambda name: object())
    with pytest.raises(TrackerError, match="mlflow needs MLFLOW_TRACKING_URI in the server's environment"):
        config.choose_trackers("mlflow")
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(TrackerError, match=r"not installed: pip install 'fedsigma\[wandb\]'"):
        config.choose_trackers("wandb")


def test_a_server_passes_the_trackers_on(studies: Studies, control: FakeControl) -> None:  # noqa: F811
    with pytest.raises(TrackerError, match="expected one of"):
        studies.submit("demo", trackers="neptune")
    assert control.started == []
    studies.submit("demo", trackers="mlflow,tensorboard")
    begin(control.started[0], "0")
    control.status["0"] = FAILED
    resume_crashed_runs(studies)
    assert [values["trackers"] for values in control.started] == ["mlflow,tensorboard", ""]


# ---- names


@given(st.lists(st.text(min_size=1, max_size=80), min_size=2, max_size=2, unique=True))
def test_different_sites_have_different_names_that_every_tracker_takes(sites: list[str]) -> None:
    one, other = (safe_name(site) for site in sites)
    assert one != other
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}", one) and not one.endswith(".")
    (name,) = row_metrics({"round": 1, "site": sites[0], "status": "accepted", "reason": "", "loss": 1})
    assert name in (f"site/{one}/loss", "all_sites/loss")


def test_only_finite_numbers_are_logged() -> None:
    row = {"round": 1, "site": "a", "status": "late", "reason": "1", "bytes_up": 3, "loss": float("nan")}
    assert row_metrics({**row, "f1": None, "auroc": float("inf")}) == {"site/a/bytes_up": 3.0}
    summary = {"study": "x", "rounds": 3, "classes": ["a"], "explanation": [{"layer": 3}]}
    summary["versions"] = {
        "demo@1": {"accuracy": 0.5, "fairness": {"worst": {"site": "a", "accuracy": 0.25}, "spread": 0.5}}
    }
    version = f"final/version/{safe_name('demo@1')}"
    assert final_metrics(summary) == {
        "final/rounds": 3.0,
        f"{version}/accuracy": 0.5,
        f"{version}/worst": 0.25,
        f"{version}/spread": 0.5,
    }
    assert flatten_parameters({"a": {"b": [1, "x"], "c": None}, "d": False}) == {"a.b": "1, x", "d": "False"}
