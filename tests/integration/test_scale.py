"""Many sites: replies are processed one by one, with the result of all at once."""

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
EVALUATION = Evaluation(accuracy=0.5, balanced_accuracy=0.5, auroc=0.5, f1=0.5, ece=0.1, test_examples=10)


class ManySites(FakeGrid):
    """Sites with one update each, which counts the replies that are still in memory."""

    def __init__(self, updates: np.ndarray, *, shuffle: int | None = None) -> None:
        super().__init__(self._site, len(updates))
        self.updates, self.most = updates, 0
        self._random = None if shuffle is None else random.Random(shuffle)
        self._replies: list[weakref.ref[Any]] = []

    def _site(self, message: Message, context: Any) -> Message:
        number = message.metadata.dst_node_id - 100
        if message.metadata.message_type == HANDSHAKE:
            name, fingerprint = f"s{number:04}", FINGERPRINT.to_json()
            reply: object = HandshakeReply(protocol=PROTOCOL, site=name, fingerprint=fingerprint, version="0")
        else:
            update = encode(self.updates[number], LAYOUT)
            reply = TrainReply(
                update=update, examples=1 + number % 7, steps=5, loss=1.0, evaluation=EVALUATION
            )
        content = to_record(reply)
        self._replies.append(weakref.ref(content))
        return Message(content, reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = super().pull_messages(message_ids)
        if self._random:
            self._random.shuffle(found)
        self.most = max(self.most, sum(one() is not None for one in self._replies))
        return found


TASK = TrainReply(update=b"", examples=1, steps=1, loss=1.0, evaluation=EVALUATION)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messenger, "time", HurriedTime())


def rounds(path: Path, grid: FakeGrid, more: str = "strategy: fedavg", count: int = 1) -> RunDir:
    """Run rounds of these sites, and return the run folder."""
    study = StudyConfig.from_yaml(STUDY.format(more=f"{more}, rounds: {count}"))
    run_dir = RunDir.create(path, study.to_yaml())
    federation = Federation(study, run_dir, Messenger(grid), ParameterPartition(LAYOUT), FINGERPRINT)
    federation.site_manager.wait_for_sites()
    train(federation, np.zeros(LAYOUT.size, np.float32))
    return run_dir


def shift(run_dir: RunDir) -> np.ndarray:
    return run_dir.load_shift().shift.numpy()


def random_updates(sites: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(sites, LAYOUT.size)).astype(np.float32)


def test_no_more_replies_are_in_memory_than_one_batch(tmp_path: Path) -> None:
    grid = ManySites(random_updates(200))
    run_dir = rounds(tmp_path / "run", grid, count=2)
    assert sum(row["status"] == "accepted" for row in run_dir.rounds()) == 2 * 200
    assert 0 < grid.most <= messenger.BATCH + 1  # and the one that is being read


def test_the_model_does_not_depend_on_the_order_of_replies(tmp_path: Path) -> None:
    # Large ones that cancel, so that the order of a sum shows in its last digits.
    small, large = random_updates(25), np.float32(1e8) * random_updates(25, seed=1)
    updates = np.concatenate([np.float32(1e-4) * small, large, -large])
    more = "strategy: fedavg, norm_factor: null, max_examples: 1"
    plain = rounds(tmp_path / "plain", ManySites(updates), more)
    for seed in range(3):
        shuffled = rounds(tmp_path / f"shuffled-{seed}", ManySites(updates, shuffle=seed), more)
        np.testing.assert_array_equal(shift(shuffled), shift(plain))
        assert shuffled.rounds() == plain.rounds()


def test_a_norm_outlier_is_not_part_of_the_mean(tmp_path: Path) -> None:
    """An outlier is known only when all updates are there; a running sum would contain it."""
    updates = random_updates(12)
    updates[5] *= 1e20
    grid = ManySites(updates)
    run_dir = rounds(tmp_path / "run", grid)
    weights = np.array([1.0 + number % 7 for number in range(12)])
    weights[5] = 0
    exact = weights @ updates.astype(np.float64) / weights.sum()
    np.testing.assert_array_equal(shift(run_dir), exact.astype(np.float32))
    (row,) = [row for row in run_dir.rounds() if row["status"] == "rejected"]
    assert row["site"] == "s0005" and "times the round's median" in row["reason"]


def test_rules_that_need_all_updates_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr"):
        rounds(tmp_path / "median", ManySites(random_updates(5)), "strategy: fedmedian")
        assert "memory grows with their number" in caplog.text
        caplog.clear()
        rounds(tmp_path / "mean", ManySites(random_updates(5)))
        assert "memory grows" not in caplog.text


vectors = st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3)


@given(st.dictionaries(st.integers(0, 9), st.tuples(vectors, st.integers(1, 10**6)), min_size=1))
def test_the_mean_is_that_of_float64(values: dict[int, tuple[list[float], int]]) -> None:
    weights = {node: weight for node, (_, weight) in values.items()}
    updates = {node: np.array(update, np.float32) for node, (update, _) in values.items()}
    expected = np.average(
        np.array([updates[n] for n in values], np.float64), axis=0, weights=list(weights.values())
    )
    np.testing.assert_allclose(weighted_mean_update(weights, updates), expected, rtol=1e-12, atol=1e-9)


def test_the_update_buffer_returns_what_was_put_and_leaves_no_file(tmp_path: Path) -> None:
    buffer: UpdateBuffer[str] = UpdateBuffer(3, tmp_path)
    first, second = np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float64)
    buffer.put("a", first)
    buffer.put("b", second)
    buffer.put("a", first + 1)
    assert list(buffer) == ["a", "b"] and len(buffer) == 2 and buffer["a"].dtype == np.float32
    np.testing.assert_array_equal(buffer["a"], first + 1)
    np.testing.assert_array_equal(buffer["b"], second)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UpdateBufferError, match=r"shape \(2,\), expected \(3,\)"):
        buffer.put("c", np.zeros(2))
    with pytest.raises(KeyError):
        buffer["c"]


def test_a_full_disk_is_reported() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    buffer: UpdateBuffer[int] = UpdateBuffer(3, Path.cwd())
    buffer._file.close()
    buffer._file = full.open("r+b", buffering=0)
    with pytest.raises(
        UpdateBufferError, match=r"12 bytes there for each site\. Make room and resume the run"
    ):
        buffer.put(1, np.zeros(3))


def test_a_reply_that_arrived_in_time_is_accepted_however_slow_the_consumer() -> None:
    grid = ManySites(random_updates(100))
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
