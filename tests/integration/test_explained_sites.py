"""What a site's own last shift changed is said in words where the site allows it and its shift is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedsigma.common.explain import ExplainError
from fedsigma.common.wire import records
from fedsigma.common.wire.codec import decode
from fedsigma.server.report import write_report
from tests.helpers.fake_grid import Tamper
from tests.helpers.fake_trainer import LAYOUT, NAMES, STUDY, FakeTrainer, fake_method  # noqa: F401
from tests.integration.test_rounds import events, run

pytestmark = pytest.mark.usefixtures("fake_method")
PLAIN = STUDY.replace("[zero_shot, local_only, pooled]", "[]").replace("rounds: 3", "rounds: 2")
PRIVATE = PLAIN + "privacy: {level: LEVEL, noise_multiplier: 20.0, clip_norm: 0.1, epsilon: 90}\n"


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the learner say a shift's length, as a share, in place of words."""

    def explain(self: FakeTrainer, shift: np.ndarray, *, heads: int = 8, phrases: int = 5) -> list[dict]:
        told = [{"phrase": f"word {n}", "g": 1.0} for n in range(phrases)]
        row = {
            "tower": "image",
            "layer": 0,
            "share": float(np.linalg.norm(shift)),
            "gained": told,
            "lost": [],
        }
        return [{**row, "head": head} for head in range(heads)]

    monkeypatch.setattr(FakeTrainer, "explain", explain, raising=False)


def unwilling(*nodes: int) -> Tamper:
    """Sites that do not let their shifts be explained."""

    def answer(node: int, task: Message, reply: Message) -> Message:
        if node not in nodes or task.metadata.message_type != records.HANDSHAKE:
            return reply
        said = records.from_record(records.HandshakeReply, reply.content)
        return Message(records.to_record(replace(said, allow_explanation=False)), reply_to=task)

    return answer


def test_last_shift_of_each_consenting_site_is_explained(tmp_path: Path) -> None:
    refuses, last = unwilling(101), {}

    def watch(node: int, task: Message, reply: Message) -> Message:
        if task.metadata.message_type == "train":
            fields = reply.content.config_records["fedsigma"]
            start = decode(task.content.config_records["fedsigma"]["shift"], LAYOUT)
            last[NAMES[node - 100]] = float(np.linalg.norm(start + decode(fields["update"], LAYOUT)))
        return refuses(node, task, reply)  # type: ignore[return-value]

    folder = run(tmp_path, PLAIN, tamper=watch)
    summary = folder.read_summary()
    found = summary["explanation_by_site"]
    assert list(found) == ["barcelona", "cellavision", "jiangxi"] and len(summary["explanation"]) == 8
    for site, rows in found.items():
        assert len(rows) == len(rows[0]["gained"]) == 3
        assert rows[0]["share"] == pytest.approx(last[site], rel=1e-5)
    page = write_report(folder).read_text()
    assert "<summary>barcelona: its last shift</summary>" in page
    assert "bccd: its last shift" not in page


@pytest.mark.parametrize(
    ("study", "told"),
    [
        (PLAIN.replace("rounds:", "masking: true, rounds:"), False),
        (PRIVATE.replace("LEVEL", "site"), False),
        (PRIVATE.replace("LEVEL", "image"), True),
    ],
    ids=["masked", "sites hidden", "noise in the change"],
)
def test_only_shifts_that_are_seen_and_not_hidden_are_explained(
    study: str, told: bool, tmp_path: Path
) -> None:
    summary = run(tmp_path, study).read_summary()
    assert ("explanation_by_site" in summary) == told and summary["explanation"]


def test_without_consent_nothing_is_explained_by_site(tmp_path: Path) -> None:
    folder = run(tmp_path, PLAIN, tamper=unwilling(100, 101, 102, 103))
    assert "explanation_by_site" not in folder.read_summary()
    assert "its last shift" not in write_report(folder).read_text()


def test_failed_explanation_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(self: FakeTrainer, shift: np.ndarray, **options: int) -> list[dict]:
        raise ExplainError("no heads here")

    monkeypatch.setattr(FakeTrainer, "explain", cannot)
    folder = run(tmp_path, PLAIN)
    assert not {"explanation", "explanation_by_site"} & folder.read_summary().keys()
    assert events(folder, "run_end")[-1]["ok"] is True
