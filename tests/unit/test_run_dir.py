"""Run folders: what is written is read back, also after a crash at any moment."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.registry.shift_file import ShiftFileError, save_shift
from fedsigma.server.runs import lock
from fedsigma.server.runs.rounds_table import METRIC_COLUMNS
from fedsigma.server.runs.run_dir import RunDir, RunDirError
from fedsigma.server.runs.summary import find_runs, summarize_run
from tests.helpers.synthetic_run import synthetic_layout, synthetic_shift, write_synthetic_run

STUDY = "name: small\nfederation: {rounds: 3}\n"
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
REPEATED = settings(max_examples=60, deadline=None)


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", STUDY)


def test_a_run_folder_is_created_once_and_opened_only_if_it_exists(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "a" / "b", STUDY)
    assert RunDir.open(tmp_path / "a" / "b").study_yaml == STUDY
    with pytest.raises(RunDirError, match=r"already holds a run.*resume=true"):
        RunDir.create(tmp_path / "a" / "b", STUDY)
    with pytest.raises(RunDirError, match="not a run folder"):
        RunDir.open(tmp_path / "a")
    with pytest.raises(RunDirError, match="does not exist"):
        RunDir.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        RunDir.create(tmp_path / "file", STUDY)


def test_events_keep_order_types_and_time(folder: RunDir) -> None:
    folder.log_event("round_start", round=1, sites=("a", "b"))
    folder.log_event("reply_accepted", round=1, site="a", bytes=np.int64(12), metrics={"f1": np.float32(0.5)})
    folder.log_event("reply_rejected", round=1, site="b", reason="line\nbreak", metrics={"loss": math.nan})
    first, second, third = folder.events()
    assert (first["kind"], first["sites"]) == ("round_start", ["a", "b"])
    assert (second["bytes"], second["metrics"]) == (12, {"f1": 0.5})
    assert (third["reason"], third["metrics"]) == ("line\nbreak", {"loss": None})
    assert first["time"] <= second["time"] <= third["time"]
    assert len((folder.path / "events.jsonl").read_text().splitlines()) == 3


def test_an_event_that_is_not_json_is_refused_and_leaves_no_trace(folder: RunDir) -> None:
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        folder.log_event("odd", value=object())
    with pytest.raises(TypeError, match="named time"):
        folder.log_event("odd", time=3)
    assert folder.events() == []


@REPEATED
@given(cut=st.integers(0, 400), sites=st.lists(NAMES, min_size=1, max_size=4))
def test_events_cut_anywhere_lose_only_the_cut_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int, sites: list[str]
) -> None:
    folder = RunDir.create(tmp_path_factory.mktemp("cut") / "run", STUDY)
    for site in sites:
        folder.log_event("site_ready", site=site)
    path = folder.path / "events.jsonl"
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    lines = content.split(b"\n")
    whole = len(lines) - 1 + (lines[-1].endswith(b"}") and _is_json(lines[-1]))

    assert [event["site"] for event in RunDir.open(folder.path).events()] == sites[:whole]
    assert path.read_bytes() == content  # reading repairs nothing
    resumed = RunDir.open(folder.path)
    resumed.log_event("run_start")
    resumed.log_event("run_end", ok=True)
    kinds = [event["kind"] for event in RunDir.open(folder.path).events()]
    assert kinds == ["site_ready"] * whole + ["run_start", "run_end"]
    assert path.read_bytes().startswith(b"\n".join(content.split(b"\n")[:whole]))


def test_an_event_that_lacks_only_its_newline_is_kept(folder: RunDir) -> None:
    folder.log_event("site_ready", site="a")
    path = folder.path / "events.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    resumed = RunDir.open(folder.path)
    assert [event["site"] for event in resumed.events()] == ["a"]
    resumed.log_event("site_ready", site="b")
    assert [event.get("site") for event in resumed.events()] == ["a", "b"]


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_a_damaged_line_is_reported_as_an_event(folder: RunDir) -> None:
    folder.log_event("site_ready", site="a")
    with (folder.path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "ki\xff\n')
    folder.log_event("site_ready", site="b")
    kinds = [(event["kind"], event.get("line")) for event in folder.events()]
    assert kinds == [("site_ready", None), ("unreadable_line", 2), ("site_ready", None)]


def test_rows_are_read_as_numbers(folder: RunDir) -> None:
    metrics = {"accuracy": 1 / 3, "auroc": math.nan, "examples": 64, "test_examples": 130.0}
    folder.log_round(1, 'a, "b"\nc', metrics, 10, 20, "rejected", "too long,\r\nby far")
    (row,) = folder.rounds()
    assert row["site"] == 'a, "b" c'
    assert row["reason"] == "too long,  by far"
    assert (row["round"], row["bytes_up"], row["bytes_down"]) == (1, 10, 20)
    assert (row["accuracy"], row["auroc"], row["f1"]) == (1 / 3, None, None)
    assert isinstance(row["examples"], int)
    assert isinstance(row["test_examples"], int)
    assert set(METRIC_COLUMNS) <= set(row)


def test_a_repeated_round_replaces_the_older_rows(folder: RunDir) -> None:
    for accuracy in (0.1, 0.2):
        for site in ("a", "b", ALL_SITES):
            folder.log_round(1, site, {"accuracy": accuracy}, 1, 1, "accepted")
    folder.log_round(2, "a", {"accuracy": 0.3}, 1, 1, "accepted")
    resumed = RunDir.open(folder.path)
    resumed.log_round(2, "a", {"accuracy": 0.4}, 1, 1, "accepted")
    found = [(row["round"], row["site"], row["accuracy"]) for row in resumed.rounds()]
    assert found == [(1, "a", 0.2), (1, "b", 0.2), (1, ALL_SITES, 0.2), (2, "a", 0.4)]
    assert (folder.path / "rounds.csv").read_text().count("round,site") == 1


def test_a_new_metric_becomes_a_column_and_keeps_the_old_rows(folder: RunDir) -> None:
    folder.log_round(1, "a", {"accuracy": 0.5}, 1, 2, "accepted", "why")
    folder.log_round(2, "a", {"accuracy": 0.6, "drift": 0.25}, 1, 2, "accepted")
    first, second = folder.rounds()
    assert (first["accuracy"], first["reason"], first["drift"]) == (0.5, "why", None)
    assert second["drift"] == 0.25


@pytest.mark.parametrize("name", ["site", "reason", "a,b", "", "x" * 65])
def test_a_metric_that_cannot_be_a_column_is_refused(folder: RunDir, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a column"):
        folder.log_round(1, "a", {name: 1.0}, 1, 1, "accepted")
    assert folder.rounds() == []


@REPEATED
@given(cut=st.integers(0, 600), sites=st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_rows_cut_anywhere_lose_only_the_cut_row(
    tmp_path_factory: pytest.TempPathFactory, cut: int, sites: list[str]
) -> None:
    folder = RunDir.create(tmp_path_factory.mktemp("cut") / "run", STUDY)
    for number, site in enumerate(sites, start=1):
        folder.log_round(number, site, {"accuracy": 0.123456789 * number}, 111, 222, "accepted")
    before = folder.rounds()
    path = folder.path / "rounds.csv"
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    whole = max(0, content.count(b"\n") - 1)

    resumed = RunDir.open(folder.path)
    assert resumed.rounds() == before[:whole]
    resumed.log_round(9, "late", {"accuracy": 0.5}, 1, 1, "accepted")
    after = RunDir.open(folder.path).rounds()
    assert after[:whole] == before[:whole]
    assert [row["site"] for row in after[whole:]] == ["late"]


ROUNDS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@REPEATED
@given(cut=st.integers(0, 500), rounds=ROUNDS)
def test_shift_magnitudes_cut_anywhere_lose_only_the_cut_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int, rounds: list[int]
) -> None:
    folder = RunDir.create(tmp_path_factory.mktemp("cut") / "run", STUDY)
    towers = [{"image": {"layers": [0], "parts": {"q": [0.5 + i, None]}}} for i in range(len(rounds))]
    for number, one in zip(rounds, towers, strict=True):
        folder.log_shift_magnitude(number, one)
    path = folder.path / "shift_magnitude.jsonl"
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    whole = content.count(b"\n") + content.endswith(b"}}}}")
    expected = dict(zip(rounds[:whole], towers, strict=False))

    resumed = RunDir.open(folder.path)
    assert resumed.shift_magnitudes() == [{"round": n, "towers": expected[n]} for n in sorted(expected)]
    assert path.read_bytes() == content  # reading repairs nothing
    resumed.log_shift_magnitude(9, {})
    assert [one["round"] for one in RunDir.open(folder.path).shift_magnitudes()] == [*sorted(expected), 9]
    assert len(path.read_bytes().splitlines()) == whole + 1


def test_a_line_that_is_no_shift_magnitude_is_left_out(folder: RunDir) -> None:
    assert folder.shift_magnitudes() == []
    folder.log_shift_magnitude(1, {"image": {"layers": [0], "parts": {"q": [math.nan, np.float32(0.5)]}}})
    with (folder.path / "shift_magnitude.jsonl").open("ab") as file:
        file.write(b'{"round": true, "towers": {}}\n{"round": 2}\n[3]\n{"rou\xff\n')
    folder.log_shift_magnitude(4, {})
    first, last = folder.shift_magnitudes()
    assert first["towers"]["image"]["parts"]["q"] == [None, 0.5] and last["round"] == 4


HOLDER = """
import sys
import time
from pathlib import Path
from fedsigma.server.runs.run_dir import RunDir
with RunDir.open(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_locked_by_one_process_until_it_dies(
    folder: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)
    folder.log_event("run_start")
    assert not folder.locked and not (folder.path / "run.lock").exists()  # asking changes nothing
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            assert folder.locked and summarize_run(folder).state == "running"
            refused = pytest.raises(RunDirError, match=rf"{re.escape(str(folder.path))} is written by a run")
            with refused, folder.lock():
                pytest.fail("a second writer got in")
            assert folder.locked
        finally:
            holder.kill()
    assert not folder.locked and summarize_run(folder).state == "interrupted"
    with folder.lock():
        assert folder.locked
    assert not folder.locked


def test_a_reader_does_not_lock_out_a_writer(folder: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder.lock():
        pass
    with (folder.path / "run.lock").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        # The writer finds the lock taken, and the reader lets go before it looks again.
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(reader, fcntl.LOCK_UN))
        with folder.lock():
            assert folder.locked


def test_without_file_locks_a_run_continues_and_is_considered_running(
    folder: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert not folder.locked  # no run ever began here
    with folder.lock():
        folder.log_event("run_start")
    assert summarize_run(folder).state == "running"
    folder.log_event("run_end", ok=True, reason="")
    assert summarize_run(folder).state == "finished"


def test_summary_and_sigma_round_trip(folder: RunDir) -> None:
    assert folder.read_summary() == {}
    folder.write_summary({"federated": {"accuracy": np.float32(0.5), "metrics": {"auroc": math.inf}}})
    assert folder.read_summary() == {"federated": {"accuracy": 0.5, "metrics": {"auroc": None}}}
    (folder.path / "summary.json").write_text("[1]")
    with pytest.raises(RunDirError, match="expected an object"):
        folder.read_summary()

    assert not folder.shift_path.exists()
    with pytest.raises(ShiftFileError):
        folder.load_shift()
    layout = synthetic_layout()
    shift = synthetic_shift(layout)
    kept = {"layout_json": layout.to_json(), "fingerprint_json": "{}", "study_yaml": STUDY}
    save_shift(folder.shift_path, shift, **kept, round=3)
    saved = folder.load_shift()
    assert saved.round == 3
    assert saved.layout_json == kept["layout_json"]
    np.testing.assert_array_equal(saved.shift.numpy(), shift)


def test_the_summary_follows_a_run_through_failure_and_resume(folder: RunDir) -> None:
    assert summarize_run(folder).state == "interrupted"
    folder.log_event("run_start")
    folder.log_round(1, ALL_SITES, {"accuracy": 0.25}, 0, 0, ALL_SITES)
    folder.log_event("round_end", round=1, sites=["a"], seconds=1.0)
    folder.log_event("run_end", ok=False, reason="no site left")
    run = summarize_run(folder)
    assert (run.state, run.reason, run.rounds_done, run.rounds_planned) == ("failed", "no site left", 1, 3)
    assert run.federated_accuracy == 0.25
    folder.log_event("run_start")
    with folder.lock():
        assert summarize_run(folder).state == "running"
    assert summarize_run(folder).state == "interrupted"
    folder.log_event("round_end", round=1, sites=["a"], seconds=1.0)
    folder.log_event("run_end", ok=True, reason="")
    assert (summarize_run(folder).state, summarize_run(folder).rounds_done) == ("finished", 1)
    folder.write_summary({"federated": {"accuracy": 0.75}})
    assert summarize_run(folder).federated_accuracy == 0.75


def test_runs_are_found_in_a_directory_and_one_level_below(tmp_path: Path) -> None:
    for name in ("one", "group/two", "a/b/c/too-deep", ".hidden"):
        RunDir.create(tmp_path / name, STUDY)
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == ["group/two", "one"]
    assert find_runs(tmp_path / "one") == [tmp_path / "one"]
    with pytest.raises(RunDirError, match="does not exist"):
        find_runs(tmp_path / "none")


def test_a_synthetic_run_reads_as_finished(tmp_path: Path) -> None:
    run = summarize_run(write_synthetic_run(tmp_path / "run", rounds=4))
    assert (run.state, run.rounds_done, run.rounds_planned, run.sites) == ("finished", 4, 4, 4)
