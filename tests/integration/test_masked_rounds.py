"""Complete studies with masked sums, by the real apps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict

from fedsigma.client.site import site
from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.ops.flower_compat import set_message_id
from fedsigma.common.wire.records import MaskedReply, TrainTask, from_record, to_record
from fedsigma.server.federation.rounds import NoModel
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.fake_trainer import LAYOUT, NAMES, STUDY, FakeTrainer, fake_method  # noqa: F401
from tests.integration.test_rounds import events, out, run, shift_of

pytestmark = pytest.mark.usefixtures("fake_method")
PLAIN = STUDY.replace("[zero_shot, local_only, pooled]", "[]")
MASKED = PLAIN.replace("rounds:", "masking: true, rounds:")


def is_masked(task: Message) -> bool:
    return task.metadata.message_type == "train"


def test_the_model_is_that_of_the_unmasked_study_to_the_rounding(tmp_path: Path) -> None:
    plain, masked = run(tmp_path, PLAIN, out="plain"), run(tmp_path, MASKED, out="masked")
    # Sum of halves over the scale: bound 16, 4 sites of 8 images, so a step of 2^-21, over 20 images.
    np.testing.assert_allclose(shift_of(masked), shift_of(plain), rtol=0, atol=3 * 2 * 2**-21 / 20 + 1e-7)
    for mine, theirs in zip(masked.rounds(), plain.rounds(), strict=True):
        if mine["site"] == ALL_SITES and mine["round"] <= 3:
            assert mine["accuracy"] == pytest.approx(theirs["accuracy"])
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
            assert (mine["examples"], mine["test_examples"]) == (theirs["examples"], theirs["test_examples"])


def test_no_sites_own_update_loss_count_or_metric_is_sent(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    def watch(node: int, task: Message, reply: Message) -> Message:
        if is_masked(task):
            from_record(MaskedReply, reply.content)
            sent.append(dict(reply.content.config_records["fedsigma"]))
        return reply

    folder = run(tmp_path, MASKED, tamper=watch)
    assert all(set(values) == {"kind", "masked", "steps"} for values in sent) and len(sent) == 12
    for row in folder.rounds():
        if row["site"] != ALL_SITES and row["round"] <= 3:
            names = ("accuracy", "f1", "loss", "examples", "test_examples")
            columns = (row[name] for name in (*names, "update_norm", "update_cosine", "shift_norm"))
            assert row["status"] == "accepted" and not any(columns)
    words = [np.frombuffer(values["masked"], "<u4") for values in sent[:4]]
    assert all(np.abs(one.view(np.int32)).max() > 2**25 for one in words)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox"])
def test_the_strategies_of_means_give_the_same_as_unmasked(strategy: str, tmp_path: Path) -> None:
    plain = run(tmp_path, PLAIN.replace("rounds:", f"strategy: {strategy}, rounds:"), out="plain")
    masked = run(tmp_path, MASKED.replace("rounds:", f"strategy: {strategy}, rounds:"), out="masked")
    np.testing.assert_allclose(shift_of(masked), shift_of(plain), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "qfedavg"])
def test_a_strategy_that_needs_single_updates_is_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"{strategy} needs each site's update: use one of fedavg"):
        StudyConfig.from_yaml(MASKED.replace("rounds:", f"strategy: {strategy}, rounds:"))


def drop(node_away: int, round: int, *, attempts: int = 1) -> Any:
    """A site that fails in the first attempts of a round."""
    seen = [0]

    def tamper(node: int, task: Message, reply: Message) -> Message:
        if is_masked(task) and node == node_away and from_record(TrainTask, task.content).round == round:
            seen[0] += 1
            if seen[0] <= attempts:
                return Message(Error(100, "OSError"), reply_to=task)
        return reply

    return tamper


def test_without_a_site_the_round_is_repeated_without_training_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, original = [0], FakeTrainer.train

    def train(self: FakeTrainer, *place: Any, **more: Any) -> Any:
        trained[0] += 1
        return original(self, *place, **more)

    monkeypatch.setattr(FakeTrainer, "train", train)
    folder = run(tmp_path, MASKED, tamper=drop(102, 2))
    assert trained[0] == 3 * len(NAMES)
    (again,) = events(folder, "masked_round_retried")
    assert again["round"] == 2 and again["sites"] == ["barcelona", "bccd", "jiangxi"]
    assert [event["site"] for event in events(folder, "site_failed")] == ["cellavision"]
    unmasked = run(tmp_path, PLAIN, out="plain", tamper=drop(102, 2))
    np.testing.assert_allclose(shift_of(folder), shift_of(unmasked), rtol=0, atol=1e-5)
    rows = {r["site"]: r for r in folder.rounds() if r["round"] == 2}
    assert rows["bccd"]["bytes_up"] > 1.9 * next(
        r["bytes_up"] for r in folder.rounds() if r["round"] == 1 and r["site"] == "bccd"
    )


def test_fresh_masks_for_each_cohort(tmp_path: Path) -> None:
    sent: dict[int, list[bytes]] = {}

    def watch(node: int, task: Message, reply: Message) -> Message:
        reply = drop(102, 1)(node, task, reply)
        if is_masked(task) and reply.has_content() and node == 100:
            number = from_record(TrainTask, task.content).round
            sent.setdefault(number, []).append(from_record(MaskedReply, reply.content).masked)
        return reply

    run(tmp_path, MASKED, rounds=1, tamper=watch)
    first, second = (np.frombuffer(data, "<u4") for data in sent[1])
    assert np.count_nonzero(first == second) == 0


def ask(node: int, task: TrainTask) -> Message:
    """A site's reply to another task in the study that ran last."""
    grid: FakeGrid = run.grid  # type: ignore[attr-defined]
    grid.tamper = None
    return grid.send_and_receive([Message(to_record(task), dst_node_id=node, message_type="train")])[0]


@pytest.fixture
def task_of(tmp_path: Path) -> TrainTask:
    """The task of the first and only round."""
    tasks: list[TrainTask] = []

    def watch(node: int, task: Message, reply: Message) -> Message:
        if is_masked(task):
            tasks.append(from_record(TrainTask, task.content))
        return reply

    run(tmp_path, MASKED, rounds=1, tamper=watch)
    return tasks[0]


def allow_cohorts(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set max_cohorts in every site's policy."""
    real = site.SitePolicy.__init__
    monkeypatch.setattr(
        site.SitePolicy, "__init__", lambda self, **values: real(self, **{**values, "max_cohorts": most})
    )


def test_a_site_refuses_too_many_cohorts_and_older_rounds(
    task_of: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(100, task_of).has_content()  # the same cohort again: the same reply, nothing new
    allow_cohorts(2, monkeypatch)
    # Another scale is another cohort: it has other masks, and counts.
    assert ask(100, replace(task_of, bound=8.0)).has_content()
    smaller = replace(task_of, members=task_of.members[:3], cohort=3, attempt=1)
    assert ask(100, smaller).error.reason == "TooManyCohorts"
    later = replace(task_of, round=3, first_step=2, total_steps=100, steps=5)
    assert ask(100, later).has_content()
    assert ask(100, replace(later, round=2)).error.reason == "TooManyCohorts"


def test_one_mask_is_for_one_vector(task_of: TrainTask) -> None:
    """Two vectors under one mask reveal their difference, and with it a single site's update."""
    words = [_words(ask(100, task_of)) for _ in range(2)]
    np.testing.assert_array_equal(*words)
    other = replace(task_of, round=2, first_step=0)
    first = _words(ask(100, other))
    # The same place with noise in what is sent, or from another start: other work is not done in a round.
    noisy = replace(
        other, privacy=PrivacyConfig(level="site", noise_multiplier=1e-3, clip_norm=1e-9, epsilon=1e9)
    )
    assert ask(100, noisy).error.reason == "MaskingError"
    assert ask(100, replace(other, steps=4)).error.reason == "MaskingError"
    np.testing.assert_array_equal(_words(ask(100, other)), first)
    # Whatever is said in a task is in the mask: nothing of one is in the other.
    again = _words(ask(100, replace(other, attempt=1)))
    assert np.count_nonzero(again == first) == 0
    loud = replace(noisy, round=3, privacy=replace(noisy.privacy, noise_multiplier=4.0, clip_norm=1.0))
    noise = [_words(ask(100, loud)) for _ in range(2)]
    np.testing.assert_array_equal(*noise)


def test_simultaneous_tasks_are_handled_one_after_the_other(
    task_of: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower starts a process for each message, all with the same state: the two cohorts of an attack."""
    allow_cohorts(1, monkeypatch)
    grid: FakeGrid = run.grid  # type: ignore[attr-defined]
    grid.tamper = None
    whole = replace(task_of, round=2)
    smaller = replace(whole, members=whole.members[:3], cohort=3)
    answers: list[Message] = []

    def send(task: TrainTask) -> None:
        copied = Context(grid.run_id, 100, grid.contexts[100].node_config, RecordDict(), {})
        message = Message(to_record(task), dst_node_id=100, message_type="train")
        set_message_id(message, "m")
        answers.append(grid.app(message, copied))

    threads = [Thread(target=send, args=(task,)) for task in (whole, smaller)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.has_content() for one in answers) == [False, True]


def test_a_restarted_node_continues_in_a_masked_study(tmp_path: Path) -> None:
    """Its state at Flower is lost, and its node id is the same."""

    def restart(node: int, task: Message, reply: Message) -> Message:
        if is_masked(task) and node == 102:
            run.grid.contexts[102].state = RecordDict()  # type: ignore[attr-defined]
        return reply

    folder = run(tmp_path, MASKED, tamper=restart)
    assert not events(folder, "site_failed") and not events(folder, "masked_round_retried")
    assert [len(event["sites"]) for event in events(folder, "round_end")] == [4, 4, 4]


def _words(reply: Message) -> np.ndarray:
    return np.frombuffer(from_record(MaskedReply, reply.content).masked, "<u4")


def test_a_site_refuses_keys_that_its_peers_have_not_signed(task_of: TrainTask) -> None:
    forged = replace(task_of.members[1], key=b"\x09" + b"\0" * 31)
    members = (task_of.members[0], forged, *task_of.members[2:])
    assert ask(100, replace(task_of, members=members, round=2)).error.reason == "MaskingError"


def test_an_update_above_the_mask_bound_fails_at_the_site(tmp_path: Path) -> None:
    study = MASKED.replace("rounds: 3", "rounds: 1, mask_bound: 0.001")
    with pytest.raises(NoModel):
        run(tmp_path, study)
    failed = events(out(tmp_path), "site_failed")
    assert {event["reason"] for event in failed} == {"MaskingError"} and len(failed) == len(NAMES)


def test_an_unmasked_reply_makes_no_model(tmp_path: Path) -> None:
    def tamper(node: int, task: Message, reply: Message) -> Message:
        if is_masked(task) and node == 101:
            reply.content.config_records["fedsigma"]["masked"] = bytes(4 * (LAYOUT.size + 4))
        return reply

    with pytest.raises(NoModel):
        run(tmp_path, MASKED, rounds=1, tamper=tamper)
    (event,) = events(out(tmp_path), "masked_sum_rejected")
    assert "sent other values than" in event["reason"]


def test_a_round_that_lost_all_sites_is_retried_under_new_masks(tmp_path: Path) -> None:
    plain, seen = run(tmp_path, PLAIN, out="plain"), list[tuple[int, int]]()

    def cut(node: int, task: Message, reply: Message) -> Message | None:
        if not is_masked(task) or task.metadata.group_id != "2":
            return reply
        seen.append((node, from_record(TrainTask, task.content).attempt))
        return None if seen[-1][1] == 0 else reply

    folder = run(tmp_path, MASKED, out="masked", tamper=cut)
    assert {attempt for _, attempt in seen} == {0, 1} and len(seen) == 8
    assert [e["round"] for e in events(folder, "round_retried")] == [2]
    np.testing.assert_allclose(shift_of(folder), shift_of(plain), rtol=0, atol=1e-6)
