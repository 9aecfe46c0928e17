"""A complete study in one process: the real apps of server and sites, with a small trainer behind them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsigma import __version__
from fedsigma.client.app import app as client
from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.sigma import Layout
from fedsigma.common.utils.hash_chain import HashChainedLog, LogTampered
from fedsigma.common.wire import records
from fedsigma.common.wire.codec import decode, encode
from fedsigma.server.app import app as server
from fedsigma.server.federation import rounds as rounds_module
from fedsigma.server.federation.aggregation import weighted_mean_update
from fedsigma.server.federation.rounds import NoModel
from fedsigma.server.federation.site_manager import TooFewSites, WrongSiteCount
from fedsigma.server.federation.updates import UpdateBuffer, UpdateBufferError
from fedsigma.server.runs import lock
from fedsigma.server.runs.run_dir import RunDir, RunDirError
from fedsigma.server.runs.summary import summarize_run
from tests.helpers.fake_grid import FakeGrid, Tamper, gone
from tests.helpers.fake_trainer import IMAGES, LAYOUT, NAMES, STUDY, FakeTrainer, fake_method  # noqa: F401

pytestmark = pytest.mark.usefixtures("fake_method")


def run(
    tmp_path: Path,
    study: str = STUDY,
    *,
    out: str = "out",
    resume: bool = False,
    rounds: int = 0,
    sites: int = 4,
    tamper: Tamper | None = None,
) -> RunDir:
    file = tmp_path / "study.yaml"
    file.write_text(study)
    config: dict[str, Any] = {"study": str(file), "out": str(tmp_path / out), "resume": resume}
    config |= {"seed": -1, "rounds": rounds}
    grid = FakeGrid(client, sites, tamper=tamper)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    run.grid = grid  # type: ignore[attr-defined]
    server(grid, context)
    return RunDir.open(tmp_path / out)


def events(folder: RunDir, kind: str) -> list[dict]:
    return [event for event in folder.events() if event["kind"] == kind]


def audit_of(tmp_path: Path) -> Path:
    """The folder of the sites' audit logs in the only run."""
    (folder,) = (tmp_path / "audit").glob("run-*")
    return folder


def out(tmp_path: Path, name: str = "out") -> RunDir:
    return RunDir.open(tmp_path / name)


def shift_of(folder: RunDir) -> np.ndarray:
    return folder.load_shift().shift.numpy()


def test_complete_study(tmp_path: Path) -> None:
    folder = run(tmp_path)
    summary = folder.read_summary()
    assert summary["rounds"] == 3 and summary["sites"] == sorted(NAMES)
    for method in ("zero_shot", "local_only", "pooled", "federated"):
        assert set(summary[method]["per_site"]) == set(NAMES)
    # Accuracy over all sites is correct predictions over test images, not a mean of the sites' accuracies.
    tests = {name: IMAGES[name] * 10 for name in NAMES}
    per_site = summary["federated"]["per_site"]
    correct = sum(round(per_site[name] * tests[name]) for name in NAMES)
    assert summary["federated"]["accuracy"] == correct / sum(tests.values())
    assert summary["federated"]["accuracy"] > summary["zero_shot"]["accuracy"]
    assert set(summary["local_only"]["everywhere_per_site"]) == set(NAMES)
    assert [event["round"] for event in events(folder, "round_end")] == [1, 2, 3]
    assert events(folder, "run_end")[-1]["ok"] is True
    saved = folder.load_shift()
    assert saved.round == 3 and saved.layout_json == LAYOUT.to_json()


def test_one_message_a_site_and_round_and_one_after_the_last(tmp_path: Path) -> None:
    run(tmp_path, STUDY.replace("[zero_shot, local_only, pooled]", "[zero_shot]"))
    kinds = [kind for node, kind in run.grid.asked if node == 100]  # type: ignore[attr-defined]
    assert kinds == ["query.hello", "train", "train", "train", "evaluate"]


def test_tasks_state_their_steps_in_the_schedule_of_the_study(tmp_path: Path) -> None:
    schedule = []

    def watch(node: int, task: Message, reply: Message) -> Message:
        values = task.content.config_records["fedsigma"]
        if node == 100 and "first_step" in values:
            names = ("mode", "first_step", "steps", "total_steps", "cohort", "evaluate")
            schedule.append(tuple(values[name] for name in names))
        return reply

    run(tmp_path, tamper=watch)
    rounds = [("round", first, 5, 15, 4, True) for first in (0, 5, 10)]
    assert schedule == [*rounds, ("local", 0, 15, 15, 1, False)]


def test_sgd_is_used_in_rounds_and_adamw_for_local_training(tmp_path: Path) -> None:
    optimisers = set()

    def watch(node: int, task: Message, reply: Message) -> Message:
        values = task.content.config_records["fedsigma"]
        if "recipe" in values:
            optimisers.add((values["mode"], json.loads(values["recipe"])["optimiser"]))
        return reply

    run(
        tmp_path,
        STUDY.replace("local_steps: 5", "local_steps: 5, optimiser: sgd"),
        tamper=watch,
    )
    assert optimisers == {("round", "sgd"), ("local", "adamw")}


def test_rows_hold_the_evaluation_of_the_incoming_model(tmp_path: Path) -> None:
    folder = run(tmp_path)
    rows = {(row["round"], row["site"]): row for row in folder.rounds()}
    summary = folder.read_summary()
    assert {round for round, _ in rows} == {1, 2, 3, 4}
    for name in NAMES:
        assert rows[1, name]["accuracy"] == summary["zero_shot"]["per_site"][name]
        assert rows[4, name]["accuracy"] == summary["federated"]["per_site"][name]
        assert rows[1, name]["examples"] == IMAGES[name]
    assert rows[4, ALL_SITES]["accuracy"] == summary["federated"]["accuracy"]
    assert summary["bytes_up_per_site_round"] == rows[1, "bccd"]["bytes_up"] > 4 * LAYOUT.size


def test_rows_have_the_statistics_of_each_update(tmp_path: Path) -> None:
    updates: dict[str, np.ndarray] = {}

    def watch(node: int, task: Message, reply: Message) -> Message:
        if task.metadata.message_type == "train" and task.content.config_records["fedsigma"]["round"] == 2:
            updates[NAMES[node - 100]] = decode(reply.content.config_records["fedsigma"]["update"], LAYOUT)
            if node == 103:  # its shift is long, so its reply is rejected
                return spoilt(task, reply)
        return reply

    def spoilt(task: Message, reply: Message) -> Message:
        sent = records.from_record(records.TrainReply, reply.content)
        long = encode(np.full(LAYOUT.size, 1e6, np.float32), LAYOUT, level="exact", seed=0)
        return Message(records.to_record(replace(sent, update=long)), reply_to=task)

    study = STUDY.replace("[zero_shot, local_only, pooled]", "[]")
    folder = run(tmp_path, study, rounds=2, tamper=watch)
    rows = {(row["round"], row["site"]): row for row in folder.rounds()}
    accepted = NAMES[:3]
    mean = sum(IMAGES[name] * updates[name] for name in accepted) / sum(IMAGES[name] for name in accepted)
    for name in accepted:
        row, update = rows[2, name], updates[name]
        assert row["update_norm"] == pytest.approx(float(np.linalg.norm(update)), rel=1e-5)
        cosine = update @ mean / np.linalg.norm(update) / np.linalg.norm(mean)
        assert row["update_cosine"] == pytest.approx(float(cosine), abs=1e-5)
    # In round 1 an update begins at zero, so it is the shift.
    assert rows[1, "bccd"]["shift_norm"] == rows[1, "bccd"]["update_norm"] != rows[2, "bccd"]["shift_norm"]
    for row in (rows[2, "jiangxi"], rows[2, ALL_SITES], rows[3, "bccd"]):
        assert row["update_norm"] is row["update_cosine"] is row["shift_norm"] is None


def test_shift_magnitudes_are_those_of_each_rounds_model(tmp_path: Path) -> None:
    folder = run(tmp_path, STUDY.replace("[zero_shot, local_only, pooled]", "[]"))
    lines = folder.shift_magnitudes()
    assert [line["round"] for line in lines] == [1, 2, 3]
    last = float(f"{np.abs(shift_of(folder)).mean():.4g}")
    assert lines[-1]["towers"] == {"image": {"layers": [0], "parts": {"q": [last]}}}
    assert lines[0]["towers"] != lines[1]["towers"]


def test_a_running_run_is_locked_for_other_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)
    states = []

    def watch(node: int, task: Message, reply: Message) -> Message:
        states.append(summarize_run(out(tmp_path)).state)
        return reply

    folder = run(tmp_path, tamper=watch)
    assert set(states) == {"running"} and summarize_run(folder).state == "finished"
    lines = len(folder.events())
    with folder.lock(), pytest.raises(RunDirError, match="is written by a run that is still running"):
        run(tmp_path, resume=True)
    assert len(folder.events()) == lines


def test_a_site_of_another_protocol_version_is_refused(tmp_path: Path) -> None:
    def older(node: int, task: Message, reply: Message) -> Message:
        if node == 103 and task.metadata.message_type == records.HANDSHAKE:
            values = dict(reply.content.config_records["fedsigma"]) | {"protocol": records.PROTOCOL - 1}
            del values["version"]
            return Message(RecordDict({"fedsigma": ConfigRecord(values)}), reply_to=task)
        return reply

    folder = run(tmp_path, rounds=1, tamper=older)
    (refused,) = events(folder, "site_refused")
    assert refused["site"] == "node 103"
    message = f"uses version {records.PROTOCOL - 1} of the messages, the server version {records.PROTOCOL}"
    assert message in refused["reason"]
    assert {e["version"] for e in events(folder, "site_ready")} == {__version__}


def test_rounds_between_evaluations_have_no_metrics_but_the_final_model_has(tmp_path: Path) -> None:
    folder = run(tmp_path, STUDY.replace("rounds: 3", "rounds: 4, evaluate_every: 2"))
    rows = {row["round"]: row for row in folder.rounds() if row["site"] == "bccd"}
    evaluated = {number: row["accuracy"] is not None for number, row in rows.items()}
    assert evaluated == {1: True, 2: False, 3: True, 4: False, 5: True}
    assert rows[2]["test_examples"] == 0 and rows[2]["examples"] == rows[1]["examples"]
    assert folder.read_summary()["zero_shot"]["per_site"]["bccd"] == rows[1]["accuracy"]


def test_the_model_is_the_weighted_mean_of_the_sites_shifts(tmp_path: Path) -> None:
    sent: dict[int, np.ndarray] = {}

    def watch(node: int, task: Message, reply: Message) -> Message:
        if task.metadata.message_type == "train":
            data = reply.content.config_records["fedsigma"]["update"]
            sent[node] = decode(data, LAYOUT)
        return reply

    folder = run(tmp_path, STUDY.replace("[zero_shot, local_only, pooled]", "[]"), rounds=1, tamper=watch)
    weights = [IMAGES[name] for name in NAMES]
    mean = np.average(np.stack([sent[100 + i] for i in range(4)]).astype(np.float64), axis=0, weights=weights)
    np.testing.assert_array_equal(shift_of(folder), mean.astype(np.float32))


def edit_reply(node: int, **values: Any) -> Tamper:
    """Make one site send other values than its app did."""

    def tamper(sender: int, task: Message, reply: Message) -> Message:
        if sender == node and task.metadata.message_type == "train":
            reply.content.config_records["fedsigma"].update(values)
        return reply

    return tamper


def coded(*values: float, tower: str = "image") -> bytes:
    entry = replace(LAYOUT.entries[0], size=len(values), tower=tower)
    return encode(np.array(values, dtype=np.float32), Layout((entry,)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"update": coded(*[0.0] * 6, tower="text")}, f"this study has {LAYOUT.digest[:12]}"),
        ({"update": coded(1.0, 2.0)}, f"this study has {LAYOUT.digest[:12]}"),
        ({"update": coded(*[99.0] * 6)}, "norm 242.5 is above the bound 50"),
        ({"update": b"\0" * 76}, "not a coded shift"),
        ({"update": coded(*[0.0] * 6)[:-1] + b"\xff"}, "checksum"),
        ({"examples": 9}, "9 training images are claimed, 4 shots of 2 classes allow 8"),
        ({"examples": -5}, "examples is -5"),
        ({"steps": 6}, "6 steps were trained, the task asked for 5"),
        ({"patient": "0815"}, "fields that a TrainReply does not have"),
        ({"evaluation.accuracy": 2.0}, "accuracy is 2.0"),
        ({"class_counts": [1, 2, 3]}, "3 class counts"),
    ],
)
def test_an_invalid_reply_is_rejected_with_its_reason_and_the_round_continues(
    tmp_path: Path, values: dict, message: str
) -> None:
    study = STUDY.replace("rounds: 3", "rounds: 2, norm_bound: 50").replace(", local_only, pooled", "")
    folder = run(tmp_path, study, tamper=edit_reply(101, **values))
    rejected = events(folder, "reply_rejected")
    assert [(event["round"], event["site"]) for event in rejected] == [(1, "bccd"), (2, "bccd")]
    assert message in rejected[0]["reason"]
    assert events(folder, "round_end")[0]["sites"] == ["barcelona", "cellavision", "jiangxi"]
    row = next(row for row in folder.rounds() if row["site"] == "bccd" and row["round"] == 1)
    assert row["status"] == "rejected" and row["accuracy"] is None
    # The final model is evaluated on the site all the same, and its zero-shot value with it.
    assert "bccd" in folder.read_summary()["zero_shot"]["per_site"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"confusions": [1, 2, 3]}, "3 counts for 1 confusion matrices of 2 classes"),
        ({"confusions": [1, 0, 0, 0]}, "counts 1 of 40 test images"),
        ({"confusions": [-1, 0, 0, 41]}, "out of range"),
    ],
)
def test_an_invalid_evaluation_is_rejected_and_the_others_are_accepted(
    tmp_path: Path, values: dict, message: str
) -> None:
    def tamper(node: int, task: Message, reply: Message) -> Message:
        if node == 101 and task.metadata.message_type == "evaluate":
            reply.content.config_records["fedsigma"].update(values)
        return reply

    folder = run(tmp_path, STUDY.replace("[zero_shot, local_only, pooled]", "[]"), rounds=1, tamper=tamper)
    (rejected,) = events(folder, "reply_rejected")
    assert rejected["site"] == "bccd" and message in rejected["reason"]
    assert set(folder.read_summary()["federated"]["per_site"]) == set(NAMES) - {"bccd"}


def test_confusion_matrices_of_all_sites_are_summed(tmp_path: Path) -> None:
    summary = run(tmp_path).read_summary()
    assert summary["classes"] == ["a", "b"]
    for method in ("federated", "local_only", "pooled"):
        matrices = summary[method]["confusion"]
        assert set(matrices["per_site"]) == set(NAMES)
        for name in NAMES:
            correct = matrices["per_site"][name][0][0]
            assert correct == round(summary[method]["per_site"][name] * IMAGES[name] * 10)
        total = np.sum(list(matrices["per_site"].values()), axis=0)
        np.testing.assert_array_equal(matrices["all_sites"], total)
        # All images are predicted as "a". The trainer itself reports an f1 of 0.5.
        correct, wrong = total[:, 0]
        assert matrices["metrics"]["f1"] == pytest.approx(correct / (2 * correct + wrong))
        assert summary[method]["metrics"]["f1"] == 0.5


def test_without_one_sites_confusion_matrix_there_is_no_sum(tmp_path: Path) -> None:
    def tamper(node: int, task: Message, reply: Message) -> Message:
        if node == 101 and task.metadata.message_type == "evaluate":
            reply.content.config_records["fedsigma"]["confusions"] = []
        return reply

    folder = run(tmp_path, STUDY.replace("[zero_shot, local_only, pooled]", "[]"), rounds=1, tamper=tamper)
    matrices = folder.read_summary()["federated"]["confusion"]
    assert set(matrices["per_site"]) == set(NAMES) - {"bccd"} and "all_sites" not in matrices


def test_values_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    data = bytearray(coded(*[0.0] * 6))
    import struct
    import zlib

    data[-4:] = struct.pack("<f", float("nan"))
    data[48:52] = struct.pack("<I", zlib.crc32(bytes(data[52:]), zlib.crc32(bytes(data[:48]))))
    folder = run(tmp_path, rounds=1, tamper=edit_reply(102, update=bytes(data)))
    assert "not finite" in events(folder, "reply_rejected")[0]["reason"]


def test_failures_are_attributed_to_their_site_without_its_text(tmp_path: Path) -> None:
    def tamper(node: int, task: Message, reply: Message) -> Message | None:
        if task.metadata.message_type != "train":
            return reply
        return {100: None, 102: gone(task)}.get(node, reply)

    folder = run(tmp_path, STUDY.replace(", local_only, pooled", ""), tamper=tamper)
    assert [event["site"] for event in events(folder, "site_timed_out")] == ["barcelona"] * 3
    failed = events(folder, "site_failed")
    assert [(e["site"], e["reason"]) for e in failed] == [("cellavision", "the site went away")] * 3
    assert events(folder, "round_end")[0]["sites"] == ["bccd", "jiangxi"]
    assert "secret" not in (folder.path / "events.jsonl").read_text()


def test_an_exceptions_text_never_leaves_the_site(tmp_path: Path) -> None:
    study = STUDY.replace("{source: demo}", "{source: demo, options: {names: [barcelona, bccd, broken]}}")
    study = study.replace(", local_only, pooled", "")
    folder = run(tmp_path, study, sites=3)
    failed = events(folder, "site_failed")
    assert {(event["site"], event["reason"]) for event in failed} == {("broken", "FileNotFoundError")}
    assert "patient-0815" not in (folder.path / "events.jsonl").read_text()
    log = (audit_of(tmp_path) / "broken.jsonl").read_text()
    assert "FileNotFoundError" in log and "patient-0815" not in log


def test_a_round_below_min_sites_makes_no_model_and_a_run_without_model_fails(tmp_path: Path) -> None:
    def only_one(node: int, task: Message, reply: Message) -> Message | None:
        return reply if node == 100 or task.metadata.message_type == "query.hello" else None

    with pytest.raises(NoModel, match="none of 3 rounds had 2 accepted replies"):
        run(tmp_path, tamper=only_one)
    folder = out(tmp_path)
    assert not folder.shift_path.exists()
    end = events(folder, "run_end")[-1]
    assert end["ok"] is False and "none of 3 rounds" in end["reason"]


def test_a_foreign_fingerprint_is_refused_on_both_sides_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.helpers.fake_trainer import FakeTrainer

    other = FakeTrainer("other", None, None, None).fingerprint.to_json()

    def foreign(node: int, task: Message, reply: Message) -> Message:
        if node == 103 and task.metadata.message_type == "query.hello":
            reply.content.config_records["fedsigma"]["fingerprint"] = other
        return reply

    folder = run(tmp_path, STUDY.replace(", local_only, pooled", ""), tamper=foreign)
    refused = events(folder, "site_refused")
    assert [event["site"] for event in refused] == ["jiangxi"]
    assert "backbone weights differ" in refused[0]["reason"]
    assert "jiangxi" not in folder.read_summary()["sites"]
    # The site compares by itself: a server with another backbone is noticed there.
    from fedsigma.common.config.study import StudyConfig

    setup = records.StudySpec.of(StudyConfig.from_yaml(STUDY))
    hello = records.HandshakeRequest(protocol=records.PROTOCOL, study=setup, fingerprint=other)
    grid = run.grid  # type: ignore[attr-defined]
    grid.tamper = None
    message = Message(records.to_record(hello), dst_node_id=103, message_type=records.HANDSHAKE)
    (reply,) = grid.send_and_receive([message])
    assert records.from_record(records.HandshakeReply, reply.content).problem == "fingerprint"
    assert "cannot take part in study 'fake': the backbone weights differ" in caplog.text


def test_a_federation_of_another_size_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(WrongSiteCount, match=r"has 4 sites, this federation has 6.*num-supernodes=4"):
        run(tmp_path, sites=6)
    with pytest.raises(WrongSiteCount, match="has 4 sites, this federation has 2"):
        run(tmp_path, sites=2, out="second")


def test_too_few_sites_by_the_deadline_is_an_error(tmp_path: Path) -> None:
    def refuse(node: int, task: Message, reply: Message) -> Message | None:
        return reply if node == 100 else None

    with pytest.raises(TooFewSites, match="1 of at least 2 sites were ready after 0 s"):
        run(tmp_path, tamper=refuse)
    assert len(events(out(tmp_path), "site_refused")) == 3


def test_a_simulation_without_one_of_its_sites_reports_the_expected_number(tmp_path: Path) -> None:
    def leave(node: int, task: Message, reply: Message) -> Message:
        if task.metadata.group_id == "1":
            run.grid.away = {103}  # type: ignore[attr-defined]
        return reply

    with pytest.raises(TooFewSites, match="3 of the simulation's 4 sites were ready after 0 s"):
        run(tmp_path, tamper=leave)


class Interrupted(RuntimeError):
    pass


def stop_in_round(number: int) -> Tamper:
    def tamper(node: int, task: Message, reply: Message) -> Message:
        values = task.content.config_records["fedsigma"]
        if values.get("mode") == "round" and values["round"] == number:
            raise Interrupted
        return reply

    return tamper


@pytest.mark.parametrize(
    "strategy",
    [
        "fedavg",
        "fedprox, options: {proximal_mu: 0.1}",
        "fedavgm, options: {server_momentum: 0.9, server_learning_rate: 0.5}",
        "fedadam, options: {eta: 0.01}",
        "fedadam, options: {eta: 0.01}, schedule: cosine",
        "fedadam, options: {eta: 0.01}, participation: 0.5, cohorts: by_images",
        "fedyogi",
        "fedmedian",
        "fedtrimmedavg, options: {beta: 0.25}",
        "krum",
        "multikrum, options: {num_nodes_to_select: 2}",
        "qfedavg",
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_with_every_strategy(tmp_path: Path, strategy: str) -> None:
    study = STUDY.replace("rounds: 3", f"rounds: 4, strategy: {strategy}").replace(", local_only, pooled", "")
    complete = run(tmp_path, study, out="complete")
    with pytest.raises(Interrupted):
        run(tmp_path, study, out="broken", tamper=stop_in_round(3))
    assert out(tmp_path, "broken").load_shift().round == 2
    resumed = run(tmp_path, study, out="broken", resume=True)
    np.testing.assert_array_equal(shift_of(resumed), shift_of(complete))
    assert resumed.read_summary()["federated"] == complete.read_summary()["federated"]
    assert resumed.read_summary()["zero_shot"] == complete.read_summary()["zero_shot"]
    assert [row["round"] for row in resumed.rounds() if row["site"] == ALL_SITES] == [1, 2, 3, 4, 5]


def test_a_run_that_a_full_disk_ended_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    study = STUDY.replace(", local_only, pooled", "")
    complete = run(tmp_path, study, out="complete")
    puts = itertools.count(1)

    put = UpdateBuffer.put

    def fill(self: UpdateBuffer[Any], key: Any, vector: Any) -> None:
        if next(puts) == 4 * 2 * 2 + 2:  # of four sites, each round's updates and last shifts
            self._file.close()
            self._file = full.open("r+b", buffering=0)
        put(self, key, vector)

    with monkeypatch.context() as patch, pytest.raises(UpdateBufferError, match="Make room and resume"):
        patch.setattr(UpdateBuffer, "put", fill)
        run(tmp_path, study, out="broken")
    (end,) = events(out(tmp_path, "broken"), "run_end")
    assert not end["ok"] and "cannot store the sites' updates" in end["reason"]
    assert out(tmp_path, "broken").load_shift().round == 2
    resumed = run(tmp_path, study, out="broken", resume=True)
    np.testing.assert_array_equal(shift_of(resumed), shift_of(complete))
    assert resumed.rounds() == complete.rounds()


def test_resuming_a_finished_or_an_empty_run(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, tamper=stop_in_round(1))
    first = run(tmp_path, resume=True)
    shift = shift_of(first)
    resumed = run(tmp_path, resume=True)
    np.testing.assert_array_equal(shift_of(resumed), shift)
    assert len(events(resumed, "round_start")) == 1 + 3


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(federation\.rounds\)"):
        run(tmp_path, rounds=7, resume=True)
    with pytest.raises(ConfigError, match="resume=true needs out"):
        config = {"study": str(tmp_path / "study.yaml"), "out": "", "resume": True, "seed": -1, "rounds": 0}
        server(
            FakeGrid(client, 4),
            Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config),
        )


PLACES = """
training: {schedule: %s, local_steps: 5}
federation: {strategy: fedadam, schedule: %s, rounds: 3, round_timeout_s: 5, wait_for_sites_s: 0}
"""


@pytest.mark.parametrize(
    ("first", "second", "keys"),
    [
        ("classes: [a, b]", "classes: [b, a]", r"classes"),
        (
            PLACES % ("cosine", "constant"),
            PLACES % ("constant", "cosine"),
            r"federation\.schedule, training\.schedule",
        ),
        ("sigma: {parts: [q, k], layers: [1]}", "sigma: {parts: [k, q], layers: [1]}", r"sigma\.parts"),
    ],
)
def test_equal_values_under_other_keys_are_other_settings(
    tmp_path: Path, first: str, second: str, keys: str
) -> None:
    plain = "name: fake\nbackbone: fake\nshots: 4\ndata: {source: demo}\nbaselines: []\n"
    classes = "" if "classes" in first else "classes: [a, b]\n"
    training = "" if "training" in first else PLACES % ("cosine", "constant")
    run(tmp_path, plain + classes + training + first)
    with pytest.raises(ConfigError, match=rf"other settings \({keys}\)"):
        run(tmp_path, plain + classes + training + second, resume=True)


def test_a_resumed_run_whose_last_rounds_fail_keeps_its_model(tmp_path: Path) -> None:
    def fail(node: int, task: Message, reply: Message) -> Message:
        return gone(task, 1) if task.metadata.group_id == "3" else reply

    study = STUDY.replace(", local_only, pooled", "")
    complete = run(tmp_path, study, out="complete", tamper=fail)
    with pytest.raises(Interrupted):
        run(tmp_path, study, tamper=stop_in_round(3))
    resumed = run(tmp_path, study, resume=True, tamper=fail)
    assert events(resumed, "round_end")[-1]["ok"] is False
    assert events(resumed, "run_end")[-1]["ok"] is True
    np.testing.assert_array_equal(shift_of(resumed), shift_of(complete))
    assert resumed.read_summary()["federated"] == complete.read_summary()["federated"]


def test_an_unknown_option_of_the_strategy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'server_momentum'"):
        run(tmp_path, STUDY.replace("rounds: 3", "rounds: 3, strategy: fedavgm, options: {momentum: 1}"))
    with pytest.raises(ConfigError, match="fedavg has no options"):
        run(tmp_path, STUDY.replace("rounds: 3", "rounds: 3, options: {fraction_train: 0.5}"))


def test_every_reply_is_in_the_audit_log_before_it_is_sent(tmp_path: Path) -> None:
    audited: list[dict] = []

    def watch(node: int, task: Message, reply: Message) -> Message:
        if node == 101:
            path = audit_of(tmp_path) / "bccd.jsonl"
            audited.append(json.loads(path.read_text().splitlines()[-1]))
            assert set(audited[-1]["reply"]["fields"]) == set(reply.content.config_records["fedsigma"])
        return reply

    run(tmp_path, tamper=watch)
    assert [line["request"]["message"] for line in audited[:2]] == ["HandshakeRequest", "TrainTask"]
    assert audited[1]["request"]["round"] == 1 and audited[1]["reply"]["bytes"] > 4 * LAYOUT.size
    path = audit_of(tmp_path) / "bccd.jsonl"
    assert len(HashChainedLog(path).lines()) == len(audited)
    path.write_text(path.read_text().replace('"round": 1', '"round": 9'))
    with pytest.raises(LogTampered, match="line 3 was changed, or"):
        HashChainedLog(path).lines()


def test_a_reply_that_cannot_be_audited_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file where the folder should be")
    with pytest.raises(TooFewSites, match=r"NotADirectoryError|FileExistsError"):
        run(tmp_path)


def test_class_counts_are_not_sent_by_default(tmp_path: Path) -> None:
    class_counts = []

    def watch(node: int, task: Message, reply: Message) -> Message:
        values = reply.content.config_records["fedsigma"]
        assert isinstance(values, ConfigRecord)
        class_counts.append(values.get("class_counts"))
        return reply

    run(tmp_path, rounds=1, tamper=watch)
    assert {tuple(counts) for counts in class_counts if counts is not None} == {()}


@pytest.mark.parametrize("damaged", ["sigma.safetensors", "strategy-3.safetensors"])
def test_after_a_damaged_checkpoint_the_last_round_is_repeated(tmp_path: Path, damaged: str) -> None:
    study = STUDY.replace("rounds: 3", "rounds: 4, strategy: fedavgm, options: {server_momentum: 0.9}")
    study = study.replace(", local_only, pooled", "")
    complete = run(tmp_path, study, out="complete")
    with pytest.raises(Interrupted):
        run(tmp_path, study, out="broken", tamper=stop_in_round(4))
    file = tmp_path / "broken" / damaged
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x80  # the sign of the last value, so that what is read is a number still
    file.write_bytes(content if damaged.startswith("sigma") else content[:-7])
    resumed = run(tmp_path, study, out="broken", resume=True)
    (event,) = events(resumed, "checkpoint_damaged")
    assert event["file"] == "sigma.safetensors" and damaged in event["reason"]
    assert [e["round"] for e in events(resumed, "round_start")] == [1, 2, 3, 4, 3, 4]
    np.testing.assert_array_equal(shift_of(resumed), shift_of(complete))


def test_the_optimiser_state_of_the_round_before_is_kept(
    tmp_path: Path,
) -> None:
    study = STUDY.replace("rounds: 3", "rounds: 5, strategy: fedavgm, options: {server_momentum: 0.9}")
    study = study.replace(", local_only, pooled", "")
    complete = run(tmp_path, study, out="complete")
    for number in (4, 4, 5):
        with pytest.raises(Interrupted):
            run(tmp_path, study, resume=(tmp_path / "out").exists(), tamper=stop_in_round(number))
        (tmp_path / "out" / "sigma.safetensors").write_bytes(b"damaged")
    resumed = run(tmp_path, study, resume=True)
    assert len(events(resumed, "checkpoint_damaged")) == 3
    np.testing.assert_array_equal(shift_of(resumed), shift_of(complete))


def test_without_a_readable_checkpoint_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, out="broken", tamper=stop_in_round(3))
    for name in ("sigma.safetensors", "sigma-previous.safetensors"):
        (tmp_path / "broken" / name).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"cannot be resumed: .*sigma.safetensors.*sigma-previous"):
        run(tmp_path, out="broken", resume=True)


def test_the_servers_audit_log_has_the_digests_of_the_sites_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIGMA_SERVER", str(tmp_path / "server"))
    study = STUDY.replace(", local_only, pooled", "")
    run(tmp_path, study, rounds=1, tamper=edit_reply(102, steps=7))
    server_lines = HashChainedLog(tmp_path / "server" / "audit.jsonl").lines()
    assert [server_lines[0]["kind"], server_lines[-1]["kind"], server_lines[-1]["ok"]] == [
        "run_start",
        "run_end",
        True,
    ]
    assert {line["site"] for line in server_lines if line["kind"] == "reply_rejected"} == {"cellavision"}
    for site in NAMES:
        sent = [line["reply"] for line in HashChainedLog(audit_of(tmp_path) / f"{site}.jsonl").lines()]
        received = [line for line in server_lines if line.get("site") == site]
        assert len(sent) == len(received) == 3
        equal = [
            (a["bytes"], a["sha256"]) == (b["bytes"], b["sha256"])
            for a, b in zip(sent, received, strict=True)
        ]
        # A reply that was changed in transit has another digest.
        assert equal == [True, site != "cellavision", True]


def test_a_round_that_lost_its_connections_is_retried(tmp_path: Path) -> None:
    study = STUDY.replace(", local_only, pooled", "")
    complete = run(tmp_path, study, out="complete")
    lost = set()

    def cut(node: int, task: Message, reply: Message) -> Message | None:
        if task.metadata.message_type == "train" and task.metadata.group_id == "2" and node not in lost:
            lost.add(node)
            return None if node % 2 else gone(task)
        return reply

    folder = run(tmp_path, study, out="cut", tamper=cut)
    assert lost == {100, 101, 102, 103}
    assert [e["round"] for e in events(folder, "round_retried")] == [2]
    assert [e["round"] for e in events(folder, "round_start")] == [1, 2, 2, 3]
    assert [(e["round"], e["ok"]) for e in events(folder, "round_end")] == [(1, True), (2, True), (3, True)]
    np.testing.assert_array_equal(shift_of(folder), shift_of(complete))
    assert {r["status"] for r in folder.rounds()} == {"accepted", ALL_SITES}


@pytest.mark.parametrize("cohorts", ["random", "by_images"])
def test_other_sites_are_sampled_in_place_of_one_that_hangs(tmp_path: Path, cohorts: str) -> None:
    """One site of two that never replies must not fail the round, nor be sampled again in it."""

    def hang(node: int, task: Message, reply: Message) -> Message | None:
        return None if node == 103 and task.metadata.message_type == "train" else reply

    study = STUDY.replace("rounds: 3", f"rounds: 8, participation: 0.5, cohorts: {cohorts}")
    folder = run(tmp_path, study.replace("[zero_shot, local_only, pooled]", "[]"), tamper=hang)
    ends = events(folder, "round_end")
    assert [e["ok"] for e in ends] == [True] * 8
    retried = [e["round"] for e in events(folder, "round_retried")]
    assert retried and len(set(retried)) == len(retried)
    rows = {(r["round"], r["site"]): r for r in folder.rounds() if r["round"] <= 8}
    for end in ends:
        # Of a round's rows only those are accepted whose updates are in its model.
        accepted = {
            site for (number, site), r in rows.items() if number == end["round"] and r["status"] == "accepted"
        }
        assert accepted == set(end["sites"])
    for number in retried:
        assert rows[number, NAMES[3]]["status"] == "late"


def test_a_round_whose_replies_are_rejected_is_not_retried(tmp_path: Path) -> None:
    def refused(node: int, task: Message, reply: Message) -> Message:
        if task.metadata.message_type == "train" and task.metadata.group_id == "2":
            reply.content.config_records["fedsigma"].update(steps=7)
        return reply

    folder = run(tmp_path, STUDY.replace(", local_only, pooled", ""), tamper=refused)
    assert not events(folder, "round_retried")
    assert [e["ok"] for e in events(folder, "round_end")] == [True, False, True]


def test_versions_are_evaluated_at_every_site_without_training(tmp_path: Path) -> None:
    study = STUDY.replace(", local_only, pooled", "")
    trained = run(tmp_path, study, out="trained")
    (published,) = events(trained, "published")
    assert published["model"] == "fake@1"
    evaluation = study + f"evaluate_versions: [fake@1, {trained.path}]\n"
    folder = run(tmp_path, evaluation, out="evaluated")
    assert {kind for _, kind in run.grid.asked} == {"query.hello", "evaluate"}  # type: ignore[attr-defined]
    versions = folder.read_summary()["versions"]
    assert list(versions) == ["zero_shot", "fake@1", str(trained.path)]
    expected = trained.read_summary()["federated"]
    for name in ("fake@1", str(trained.path)):
        assert (
            versions[name]["per_site"] == expected["per_site"]
            and versions[name]["accuracy"] == expected["accuracy"]
        )
    shares, fair = expected["per_site"], versions["fake@1"]["fairness"]
    assert fair["worst"]["accuracy"] == min(shares.values()) == shares[fair["worst"]["site"]]
    assert fair["spread"] == max(shares.values()) - min(shares.values())
    assert fair["deviation"] == pytest.approx(np.std(list(shares.values())))
    assert not events(folder, "published") and not events(folder, "round_start")
    page = folder.report_path.read_text()
    assert "Worst site" in page and "fake@1" in page and "<h2>Methods</h2>" not in page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate_versions: [fake@7]", "no model 'fake'"),
        ("evaluate_versions: [x]\nbaselines: [pooled]", "evaluate_versions trains nothing"),
        ("evaluate_versions: [x]\npersonal: {towers: [text]}", "leave the section personal out"),
    ],
)
def test_versions_that_cannot_be_evaluated_are_named(tmp_path: Path, line: str, message: str) -> None:
    plain = STUDY.replace("baselines: [zero_shot, local_only, pooled]\n", "")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, plain + line + "\n")


def test_a_share_of_the_sites_is_sampled_each_round(tmp_path: Path) -> None:
    """With participation 0.5, two of four sites train in a round, not always the same two."""
    study = STUDY.replace("rounds: 3", "rounds: 6, participation: 0.5")
    folder = run(tmp_path, study)
    cohorts = [tuple(event["sites"]) for event in events(folder, "round_start")]
    assert [len(sites) for sites in cohorts] == [2] * 6
    assert {site for sites in cohorts for site in sites} == set(NAMES)
    assert len(set(cohorts)) > 1
    trained = [node for node, kind in run.grid.asked if kind.startswith("train")]  # type: ignore[attr-defined]
    assert len(trained) == 12 + 4  # and each once for local only
    repeated = run(tmp_path, study, out="repeated")
    assert [tuple(event["sites"]) for event in events(repeated, "round_start")] == cohorts
    assert set(folder.read_summary()["zero_shot"]["per_site"]) == set(NAMES)


def test_baselines_train_for_as_many_steps_as_the_sampled_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of the sites in a round, local training has half of the steps, and pooled as many as all."""
    totals: list[tuple[int, int]] = []
    train = FakeTrainer.train

    def record(self: FakeTrainer, shift: Any, examples: Any, recipe: Any, **where: Any) -> Any:
        totals.append((len(examples), where["total_steps"]))
        return train(self, shift, examples, recipe, **where)

    monkeypatch.setattr(FakeTrainer, "train", record)
    study = STUDY.replace("rounds: 3", "rounds: 6, participation: 0.5").replace("zero_shot, ", "")
    run(tmp_path, study)
    steps = StudyConfig.from_yaml(study).training.local_steps
    in_rounds, rest = totals[:12], totals[12:]
    assert {total for _, total in in_rounds} == {6 * steps}
    assert sorted(rest) == sorted(
        [(IMAGES[name], 3 * steps) for name in NAMES] + [(sum(IMAGES.values()), 12 * steps)]
    )


def test_sites_with_more_images_are_sampled_more_often_with_equal_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once all sites reported their counts, each is sampled in proportion to its images."""
    weights: list[list[float]] = []

    def record(round_weights: Any, updates: Any) -> Any:
        weights.append(list(round_weights.values()))
        return weighted_mean_update(round_weights, updates)

    monkeypatch.setattr(rounds_module, "weighted_mean_update", record)
    study = STUDY.replace("rounds: 3", "rounds: 42, participation: 0.5, cohorts: by_images")
    folder = run(tmp_path, study.replace("baselines: [zero_shot, local_only, pooled]\n", "baselines: []\n"))
    sampled = [event["sites"] for event in events(folder, "round_start")]
    assert {len(sites) for sites in sampled} == {2}
    counts = {name: sum(name in sites for sites in sampled[2:]) for name in NAMES}
    expected = {name: 2 * 40 * IMAGES[name] / sum(IMAGES.values()) for name in NAMES}
    assert counts == pytest.approx(expected, abs=3)
    assert max(expected.values()) - min(expected.values()) > 8
    # In the first rounds as its images say, since it was as likely as any to be sampled.
    assert weights[0][0] != weights[0][1]
    assert len(weights) == 42 and all(one == pytest.approx(other) for one, other in weights[4:])


def test_at_least_min_sites_are_sampled(tmp_path: Path) -> None:
    """A small participation does not go below min_sites."""
    folder = run(
        tmp_path, STUDY.replace("rounds: 3, min_sites: 2", "rounds: 2, participation: 0.01, min_sites: 3")
    )
    assert [len(event["sites"]) for event in events(folder, "round_start")] == [3, 3]
