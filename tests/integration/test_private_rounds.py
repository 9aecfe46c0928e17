"""Complete private studies, by the real apps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedsigma.client.site.privacy_ledger import PrivacyLedger
from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.privacy.accounting import PrivacyEvent, epsilon
from fedsigma.common.privacy.noise import SecureRandom
from fedsigma.common.wire.codec import encode
from fedsigma.common.wire.records import TrainReply, TrainTask, from_record, to_record
from fedsigma.server.federation.rounds import NoModel
from fedsigma.server.report import write_report
from tests.helpers.fake_trainer import LAYOUT, NAMES, STUDY, FakeTrainer, fake_method  # noqa: F401
from tests.integration.test_rounds import audit_of, events, out, run, shift_of

pytestmark = pytest.mark.usefixtures("fake_method")
PLAIN = STUDY.replace("[zero_shot, local_only, pooled]", "[]")
IMAGE = PLAIN + "privacy: {level: image, noise_multiplier: 4.0, clip_norm: 1.0, epsilon: 50}\n"
SITE = PLAIN + "privacy: {level: site, noise_multiplier: 8.0, clip_norm: 0.1, epsilon: 4}\n"
MASKED = ("rounds:", "masking: true, rounds:")
# barcelona has 2 images, of which a batch of 32 takes all.
ROUND = PrivacyEvent(rate=1.0, noise_multiplier=4.0, steps=5)


def ledger(tmp_path: Path, site: str = "barcelona") -> PrivacyLedger:
    (file,) = (tmp_path / "audit" / "privacy").glob(f"{site}-*.jsonl")
    return PrivacyLedger(file)


def test_every_round_is_charged_and_reported_at_each_site(tmp_path: Path) -> None:
    folder = run(tmp_path, IMAGE)
    for site in NAMES:
        assert [e.round for e in ledger(tmp_path, site).entries()] == [1, 2, 3]
    rows = {(r["round"], r["site"]): r for r in folder.rounds()}
    for round in (1, 2, 3):
        expected = epsilon([ROUND] * round, 1e-5)
        assert rows[round, "barcelona"]["epsilon"] == pytest.approx(expected)
        assert rows[round, ALL_SITES]["epsilon"] == pytest.approx(expected)
        assert rows[round, "barcelona"]["loss"] is None and rows[round, ALL_SITES]["loss"] is None
    assert "epsilon" in write_report(folder).read_text()


@pytest.mark.parametrize(("study", "logged"), [(IMAGE, True), (SITE, False)])
def test_statistics_are_logged_of_noisy_updates_only(study: str, logged: bool, tmp_path: Path) -> None:
    rows = [row for row in run(tmp_path, study).rounds() if row["status"] == "accepted" and row["round"] <= 3]
    assert len(rows) == 12
    for row in rows:
        assert (row["update_norm"] is not None, row["shift_norm"] is not None) == (logged, logged)
        assert logged or row["update_cosine"] is None


def test_a_round_is_charged_before_training_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **more: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(FakeTrainer, "train", crash)
    with pytest.raises(NoModel):
        run(tmp_path, IMAGE)
    assert len(ledger(tmp_path).entries()) == 3


def test_when_budgets_are_exhausted_the_study_ends_with_its_model(tmp_path: Path) -> None:
    two = epsilon([ROUND] * 2, 1e-5)
    study = IMAGE.replace("epsilon: 50", f"epsilon: {two + 0.01:.3f}").replace("rounds: 3", "rounds: 6")
    folder = run(tmp_path, study)
    assert {e["site"] for e in events(folder, "site_budget_exhausted")} == set(NAMES)
    assert {e["round"] for e in events(folder, "site_budget_exhausted")} == {3}
    assert events(folder, "site_failed") == []
    assert events(folder, "budgets_exhausted")[0]["round"] == 4
    assert events(folder, "run_end")[-1]["ok"] is True
    assert folder.load_shift().round == 2
    assert folder.read_summary()["federated"]["accuracy"] is not None
    assert "privacy budget exhausted: no more training" in write_report(folder).read_text()
    asked = [kind for node, kind in run.grid.asked if node == 100]  # type: ignore[attr-defined]
    assert asked == ["query.hello", "train", "train", "train", "evaluate"]


def test_a_site_with_an_exhausted_budget_is_left_out_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site had another run before; the study's budget counts it."""
    original = PrivacyLedger.charge

    def charge(self: PrivacyLedger, entry: Any, privacy: Any, **more: Any) -> float:
        if "bccd" in self.path.name and entry.round == 2:
            raise budget_spent("spent")
        return original(self, entry, privacy, **more)

    from fedsigma.client.site.privacy_ledger import PrivacyBudgetSpent as budget_spent

    monkeypatch.setattr(PrivacyLedger, "charge", charge)
    for name, text in (("open", IMAGE), ("masked", IMAGE.replace(*MASKED))):
        folder = run(tmp_path, text, out=name)
        assert [e["site"] for e in events(folder, "site_budget_exhausted")] == ["bccd"]
        third = [r for r in folder.rounds() if r["round"] == 3]
        assert sorted(r["site"] for r in third) == [ALL_SITES, "barcelona", "cellavision", "jiangxi"]
        final = [r["site"] for r in folder.rounds() if r["round"] == 4]
        assert set(final) == {*NAMES, ALL_SITES}


def test_a_resumed_study_keeps_its_privacy_cost(tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(node: int, task: Message, reply: Message) -> Message:
        training = node == 103 and task.metadata.message_type == "train"
        if training and from_record(TrainTask, task.content).round == 3:
            raise Stop
        return reply

    with pytest.raises(Stop):
        run(tmp_path, IMAGE, tamper=stop)
    folder = run(tmp_path, IMAGE, resume=True)
    # The third round was trained twice, so it was paid for twice.
    assert [e.round for e in ledger(tmp_path).entries()] == [1, 2, 3, 3]
    last = next(r for r in folder.rounds() if r["round"] == 3 and r["site"] == "barcelona")
    assert last["epsilon"] == pytest.approx(epsilon([ROUND] * 4, 1e-5))


def test_a_round_masked_for_a_second_cohort_is_charged_once(tmp_path: Path) -> None:
    from tests.integration.test_masked_rounds import drop

    run(tmp_path, IMAGE.replace(*MASKED), tamper=drop(102, 2))
    assert [e.round for e in ledger(tmp_path).entries()] == [1, 2, 3]


def test_a_site_that_reports_its_loss_adds_no_noise_and_is_rejected(tmp_path: Path) -> None:
    def tell(node: int, task: Message, reply: Message) -> Message:
        if node == 101 and task.metadata.message_type == "train":
            reply.content.config_records["fedsigma"]["loss"] = 0.5
        return reply

    folder = run(tmp_path, IMAGE, tamper=tell)
    assert {e["site"] for e in events(folder, "reply_rejected")} == {"bccd"}
    assert "does not add noise" in events(folder, "reply_rejected")[0]["reason"]


def test_a_missing_loss_is_rejected_without_privacy(tmp_path: Path) -> None:
    def hide(node: int, task: Message, reply: Message) -> Message:
        if node == 101 and task.metadata.message_type == "train":
            reply.content.config_records["fedsigma"]["loss"] = math.nan
        return reply

    folder = run(tmp_path, PLAIN, tamper=hide)
    assert events(folder, "reply_rejected")[0]["reason"] == "the loss is not a number"


def moved(tmp_path: Path, study: str, size: float, name: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The model of one round in which a site sends an update of this size, without the noise."""
    monkeypatch.setattr(SecureRandom, "normal", lambda self, count: np.zeros(count))

    def tamper(node: int, task: Message, reply: Message) -> Message:
        if node == 103 and task.metadata.message_type == "train" and reply.has_content():
            sent = from_record(TrainReply, reply.content)
            update = np.full(LAYOUT.size, size, np.float32)
            values = {**sent.__dict__, "update": encode(update, LAYOUT, level="exact")}
            return Message(to_record(TrainReply(**values)), reply_to=task)
        return reply

    return shift_of(run(tmp_path, study, out=name, rounds=1, tamper=tamper))


def test_one_site_moves_the_model_by_its_share_of_the_clip_norm_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none, large, huge = (
        moved(tmp_path, SITE, size, f"out{size}", monkeypatch) for size in (0.0, 1.0, 1000.0)
    )
    assert np.linalg.norm(large - none) == pytest.approx(0.1 / 4, rel=1e-4)
    np.testing.assert_allclose(huge, large, atol=1e-6)


def test_site_level_privacy_is_charged_at_each_site_too(tmp_path: Path) -> None:
    run(tmp_path, SITE)
    entries = ledger(tmp_path).entries()
    assert [(e.round, e.level, e.event.rate, e.event.steps) for e in entries] == [
        (number, "site", 1.0, 1) for number in (1, 2, 3)
    ]


@pytest.mark.parametrize("study", [SITE, PLAIN.replace(*MASKED)])
def test_local_training_is_refused_where_updates_are_hidden(study: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'local_only', which would show each site's update"):
        run(tmp_path, study.replace("baselines: []", "baselines: [local_only]"))


def test_under_site_level_privacy_no_norm_rejects_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the round's median, whether a long update is accepted would depend on the other sites'."""
    study = SITE.replace("rounds:", "norm_bound: 0.5, rounds:")
    for size in (0.0, 1000.0):
        moved(tmp_path, study, size, f"out{size}", monkeypatch)
        folder = out(tmp_path, f"out{size}")
        assert not events(folder, "reply_rejected")
        assert len(events(folder, "round_end")[0]["sites"]) == 4


@pytest.mark.parametrize("masking", [False, True])
def test_the_models_noise_is_that_of_site_level_privacy(
    masking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of the first round over many runs: its spread is that of the noise."""
    study = SITE.replace(*MASKED) if masking else SITE
    shifts = [shift_of(run(tmp_path, study, out=f"out{k}", rounds=1)) for k in range(25)]
    deviation = np.stack(shifts).std(0, ddof=1).mean()
    assert deviation == pytest.approx(8.0 * 0.1 / 4, rel=0.25)


def test_masked_private_sites_weigh_the_same_and_report_no_image_counts(tmp_path: Path) -> None:
    folder = run(tmp_path, SITE.replace(*MASKED))
    totals = next(r for r in folder.rounds() if r["round"] == 1 and r["site"] == ALL_SITES)
    assert (totals["examples"], totals["test_examples"]) == (4, 0)
    assert totals["loss"] is None and totals["accuracy"] is None
    spent = epsilon([PrivacyEvent(rate=1.0, noise_multiplier=8.0, steps=1)], 1e-5)
    assert totals["epsilon"] == pytest.approx(spent)
    assert [e.level for e in ledger(tmp_path).entries()] == ["site"] * 3


def test_a_study_over_its_privacy_budget_is_not_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"raise privacy\.noise_multiplier to"):
        run(tmp_path, SITE.replace("noise_multiplier: 8.0", "noise_multiplier: 0.5"))
    assert not (tmp_path / "out").exists()


def test_the_local_only_baseline_is_private_too(tmp_path: Path) -> None:
    folder = run(tmp_path, IMAGE.replace("baselines: []", "baselines: [local_only, pooled]"))
    assert [e.mode for e in ledger(tmp_path).entries()] == ["round"] * 3 + ["local"]
    assert "local_only" in folder.read_summary()


def test_the_audit_log_has_every_training_task(tmp_path: Path) -> None:
    run(tmp_path, IMAGE)
    audit = (audit_of(tmp_path) / "barcelona.jsonl").read_text().splitlines()
    trained = [json.loads(line) for line in audit if '"TrainTask"' in line]
    assert all(line["reply"]["fields"]["loss"] == "nan" for line in trained) and len(trained) == 3
    assert out(tmp_path).read_summary()["rounds"] == 3
