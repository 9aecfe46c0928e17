"""What coding takes from a change is sent with the next one, and only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedsigma.client.site.error_feedback import ErrorFeedback
from fedsigma.common.sigma import Layout
from fedsigma.common.wire.codec import decode
from fedsigma.common.wire.records import TrainTask, from_record
from tests.helpers.fake_trainer import LAYOUT, NAMES, STUDY, fake_method  # noqa: F401
from tests.integration.test_rounds import run, shift_of

pytestmark = pytest.mark.usefixtures("fake_method")
LOST = np.arange(LAYOUT.size, dtype=np.float32)
ONLY_ROUNDS = STUDY.replace("[zero_shot, local_only, pooled]", "[]").replace("rounds: 3", "rounds: 12")


def test_a_residual_is_stored_for_later_rounds_of_the_same_layout() -> None:
    state = RecordDict()
    feedback = ErrorFeedback(state)
    assert not feedback.residual(LAYOUT, before=1).any()
    feedback.store(LOST, LAYOUT, round=3)
    again = ErrorFeedback(state)  # as a new process of the site finds it
    np.testing.assert_array_equal(again.residual(LAYOUT, before=5), LOST)
    assert not again.residual(LAYOUT, before=3).any()  # the round is asked for again
    other = Layout((replace(LAYOUT.entries[0], tower="text"),))
    assert not again.residual(other, before=5).any()
    again.store(0 * LOST, LAYOUT, round=4)
    assert not state


def drift(tmp_path: Path, codec: str, name: str = "coarse") -> float:
    """How far a study with a coarse coding ends from one with an exact coding."""
    exact = shift_of(run(tmp_path, ONLY_ROUNDS, out=f"{name}-exact"))
    coarse = shift_of(run(tmp_path, ONLY_ROUNDS.replace("rounds:", f"codec: {codec}, rounds:"), out=name))
    return float(np.linalg.norm(coarse - exact) / np.linalg.norm(exact))


def test_feedback_keeps_a_coarsely_coded_study_near_the_exact_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = drift(tmp_path, "small", "with")
    monkeypatch.setattr(ErrorFeedback, "store", lambda *_, **__: None)
    far = drift(tmp_path, "small", "without")
    assert near < 0.03 and far > 2 * near


@pytest.mark.parametrize(("codec", "most"), [("exact", 1e-6), ("half", 2e-3), ("int8", 2e-2)])
def test_finer_codings_stay_nearer(codec: str, most: float, tmp_path: Path) -> None:
    assert drift(tmp_path, codec) < most


def test_the_servers_shift_takes_no_error_from_its_own_coding(tmp_path: Path) -> None:
    """What the sites start from is coded, but the model is the mean of their changes on the exact shift."""
    tasks: list[TrainTask] = []
    changes: dict[int, list[np.ndarray]] = {}

    def watch(node: int, task: Message, reply: Message) -> Message:
        if task.metadata.message_type == "train":
            tasks.append(from_record(TrainTask, task.content))
            data = reply.content.config_records["fedsigma"]["update"]
            changes.setdefault(tasks[-1].round, []).append(decode(data, LAYOUT, level="small"))
        return reply

    study = ONLY_ROUNDS.replace("rounds: 12", "codec: small, rounds: 3")
    folder = run(tmp_path, study, tamper=watch)
    weights = [2.0, 4.0, 6.0, 8.0]
    moves = [np.average(np.stack(changes[n]).astype(np.float64), axis=0, weights=weights) for n in (1, 2, 3)]
    np.testing.assert_allclose(shift_of(folder), np.sum(moves, axis=0), rtol=1e-6, atol=1e-7)
    started = decode(tasks[-1].shift, LAYOUT, level="int8")
    assert 0 < np.abs(started - np.sum(moves[:2], axis=0)).max() < 0.02


def test_each_site_keeps_its_own(tmp_path: Path) -> None:
    run(tmp_path, ONLY_ROUNDS.replace("rounds: 12", "codec: small, rounds: 2"))
    contexts: dict[int, Context] = run.grid.contexts  # type: ignore[attr-defined]
    residuals = [ErrorFeedback(context.state).residual(LAYOUT, before=3) for context in contexts.values()]
    assert len(residuals) == len(NAMES) and all(one.any() for one in residuals)
    assert len({one.tobytes() for one in residuals}) == len(NAMES)
