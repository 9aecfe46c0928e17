"""Many sites: replies are taken one by one, and what comes out is what all at once would give."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.ops.flower_compat import ObjectPushError
from fedsigma.common.sigma import ParameterPartition
from fedsigma.common.wire.codec import encode
from fedsigma.common.wire.records import (
    HANDSHAKE,
    PROTOCOL,
    Evaluation,
    HandshakeReply,
    TrainReply,
    to_record,
)
from fedsigma.server.federation import messenger
from fedsigma.server.federation.aggregation import weighted_mean_update
from fedsigma.server.federation.federation import Federation
from fedsigma.server.federation.messenger import Messenger
from fedsigma.server.federation.rounds import train
from fedsigma.server.federation.updates import UpdateBuffer, UpdateBufferError
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.fake_trainer import FINGERPRINT, LAYOUT, HurriedTime

STUDY = """
name: scale
backbone: fake
classes: [a, b]
shots: 50
training: {{local_steps: 5}}
federation: {{min_sites: 2, round_timeout_s: 5, wait_for_sites_s: 0, {more}}}
baselines: []
"""
FOUND = Evaluation(accuracy=0.5, balanced_accuracy=0.5, auroc=0.5, f1=0.5, ece=0.1, test_examples=10)


class ManySites(FakeGrid):
    """Sites with a change each, and replies that it can count as long as anybody holds them."""

    def __init__(self, changes: np.ndarray, *, shuffle: int | None = None) -> None:
        super().__init__(self._site, len(changes))
        self.changes, self.most = changes, 0
        self._random = None if shuffle is None else random.Random(shuffle)
        self._made: list[weakref.ref[Any]] = []

    def _site(self, message: Message, context: Any) -> Message:
        number = message.metadata.dst_node_id - 100
        if message.metadata.message_type == HANDSHAKE:
            name, fingerprint = f"s{number:04}", FINGERPRINT.to_json()
            reply: object = HandshakeReply(protocol=PROTOCOL, site=name, fingerprint=fingerprint, version="0")
        else:
            change = encode(self.changes[number], LAYOUT)
            reply = TrainReply(update=change, examples=1 + number % 7, steps=5, loss=1.0, evaluation=FOUND)
        content = to_record(reply)
        self._made.append(weakref.ref(content))
        return Message(content, reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = super().pull_messages(message_ids)
        if self._random:
            self._random.shuffle(found)
        self.most = max(self.most, sum(one() is not None for one in self._made))
        return found


TASK = TrainReply(update=b"", examples=1, steps=1, loss=1.0, evaluation=FOUND)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messenger, "time", HurriedTime())


def rounds(path: Path, grid: FakeGrid, more: str = "strategy: fedavg", count: int = 1) -> RunDir:
    """Run rounds of these sites; the run folder says what came of them."""
    study = StudyConfig.from_yaml(STUDY.format(more=f"{more}, rounds: {count}"))
    run_dir = RunDir.create(path, study.to_yaml())
    federation = Federation(study, run_dir, Messenger(grid), ParameterPartition(LAYOUT), FINGERPRINT)
    federation.site_manager.wait_for_sites()
    train(federation, np.zeros(LAYOUT.size, np.float32))
    return run_dir


def shift(run_dir: RunDir) -> np.ndarray:
    return run_dir.load_shift().shift.numpy()


def random_changes(sites: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(sites, LAYOUT.size)).astype(np.float32)


def test_of_many_sites_no_more_replies_are_held_than_are_pulled_at_once(tmp_path: Path) -> None:
    grid = ManySites(random_changes(200))
    ours = rounds(tmp_path / "run", grid, count=2)
    assert sum(row["status"] == "accepted" for row in ours.rounds()) == 2 * 200
    assert 0 < grid.most <= messenger.BATCH + 1  # and the one that is being read


def test_the_last_bit_does_not_depend_on_who_answers_first(tmp_path: Path) -> None:
    # Large ones that cancel, so that the order of a sum shows in its last digits.
    small, large = random_changes(25), np.float32(1e8) * random_changes(25, seed=1)
    changes = np.concatenate([np.float32(1e-4) * small, large, -large])
    more = "strategy: fedavg, norm_factor: null, max_examples: 1"
    plain = rounds(tmp_path / "plain", ManySites(changes), more)
    for seed in range(3):
        shuffled = rounds(tmp_path / f"shuffled-{seed}", ManySites(changes, shuffle=seed), more)
        np.testing.assert_array_equal(shift(shuffled), shift(plain))
        assert shuffled.rounds() == plain.rounds()


def test_a_change_out_of_proportion_leaves_no_trace_in_the_mean(tmp_path: Path) -> None:
    """It is known for one only when all are there, when a running sum would hold it already."""
    changes = random_changes(12)
    changes[5] *= 1e20
    grid = ManySites(changes)
    ours = rounds(tmp_path / "run", grid)
    weights = np.array([1.0 + number % 7 for number in range(12)])
    weights[5] = 0
    exact = weights @ changes.astype(np.float64) / weights.sum()
    np.testing.assert_array_equal(shift(ours), exact.astype(np.float32))
    (row,) = [row for row in ours.rounds() if row["status"] == "rejected"]
    assert row["site"] == "s0005" and "times the round's median" in row["reason"]


def test_rules_that_need_all_updates_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr"):
        rounds(tmp_path / "median", ManySites(random_changes(5)), "strategy: fedmedian")
        assert "memory grows with their number" in caplog.text
        caplog.clear()
        rounds(tmp_path / "mean", ManySites(random_changes(5)))
        assert "memory grows" not in caplog.text


vectors = st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3)


@given(st.dictionaries(st.integers(0, 9), st.tuples(vectors, st.integers(1, 10**6)), min_size=1))
def test_the_mean_is_that_of_float64(told: dict[int, tuple[list[float], int]]) -> None:
    weights = {node: weight for node, (_, weight) in told.items()}
    changes = {node: np.array(change, np.float32) for node, (change, _) in told.items()}
    expected = np.average(
        np.array([changes[n] for n in told], np.float64), axis=0, weights=list(weights.values())
    )
    np.testing.assert_allclose(weighted_mean_update(weights, changes), expected, rtol=1e-12, atol=1e-9)


def test_vectors_come_back_as_they_were_put_and_leave_nothing(tmp_path: Path) -> None:
    kept: UpdateBuffer[str] = UpdateBuffer(3, tmp_path)
    first, second = np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float64)
    kept.put("a", first)
    kept.put("b", second)
    kept.put("a", first + 1)
    assert list(kept) == ["a", "b"] and len(kept) == 2 and kept["a"].dtype == np.float32
    np.testing.assert_array_equal(kept["a"], first + 1)
    np.testing.assert_array_equal(kept["b"], second)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UpdateBufferError, match=r"shape \(2,\), expected \(3,\)"):
        kept.put("c", np.zeros(2))
    with pytest.raises(KeyError):
        kept["c"]


def test_a_full_disk_is_said_to_be_one() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    kept: UpdateBuffer[int] = UpdateBuffer(3, Path.cwd())
    kept._file.close()
    kept._file = full.open("r+b", buffering=0)
    with pytest.raises(
        UpdateBufferError, match=r"12 bytes there for each site\. Make room and resume the run"
    ):
        kept.put(1, np.zeros(3))


def test_a_reply_that_came_in_time_counts_however_long_those_before_it_take() -> None:
    grid = ManySites(random_changes(100))
    clock = messenger.time
    received = 0
    for reply in Messenger(grid).send_tasks(grid.contexts, TASK, kind="train", timeout=5):
        received += reply.content is not None
        clock.skipped += 1.0  # type: ignore[attr-defined]
    assert received == 100


def test_one_record_goes_to_all_sites_with_the_same_task() -> None:
    FakeGrid(None, 0)  # gives this process an identity, without which there are no messages
    sent = messenger.build_messages([1, 2], TASK, kind="train", ttl=5)
    assert sent[1].content is sent[2].content


@pytest.mark.parametrize(("failures", "ends"), [(2, True), (4, False)])
def test_messages_are_pushed_again_if_the_superlink_restarted_meanwhile(
    failures: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after it took a message and before its content, a SuperLink refuses the content."""

    class Restarted(FakeGrid):
        pushes = 0

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            self.pushes += 1
            if self.pushes <= failures:
                raise ObjectPushError("id", 1, "session")
            return super().push_messages(messages)

    monkeypatch.setattr(messenger.time, "sleep", lambda seconds: None)
    grid = Restarted(lambda message, context: Message(RecordDict(), reply_to=message), 2)
    if ends:
        assert len(list(Messenger(grid).send_tasks((100, 101), TASK, kind="train", timeout=5))) == 2
    else:
        with pytest.raises(ObjectPushError):
            Messenger(grid).send_tasks((100, 101), TASK, kind="train", timeout=5)
