"""The server's parts one by one: attribution, pooling, the roster, and the averaging strategies."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from bench.methods.federation import _Strategy
from fedsigma.common.config.federation import STRATEGIES
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.wire.records import PROTOCOL, Evaluation, HandshakeReply, to_record
from fedsigma.server.federation import site_manager as roster_of
from fedsigma.server.federation.aggregation import (
    StateError,
    drift,
    make_averaging,
    restore_state,
    save_state,
    set_step,
    weighted_mean_update,
)
from fedsigma.server.federation.messenger import SiteReply, in_order, match_replies
from fedsigma.server.federation.site_manager import SiteManager
from fedsigma.server.federation.validation import ValidUpdate, aggregate_metrics
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import FakeGrid, gone
from tests.helpers.fake_trainer import FINGERPRINT, STUDY

NAN = math.nan


def sent(*nodes: int) -> dict[int, Message]:
    FakeGrid(None, 0)  # gives this process an identity, without which there are no messages
    messages = {node: Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes}
    for node, message in messages.items():
        message.metadata.__dict__["_message_id"] = f"to-{node}"
    return messages


def test_every_failure_goes_to_its_own_site() -> None:
    tasks = sent(7, 8, 9, 10)
    content = to_record(HandshakeReply(protocol=PROTOCOL, site="x", fingerprint="", version="0.1.0"))
    replies = [
        gone(tasks[9], code=3),
        Message(Error(2, "secret text"), reply_to=tasks[8]),
        Message(content, reply_to=tasks[7]),
        Message(Error(2, "a second reply"), reply_to=tasks[7]),
        Message(Error(2, "never asked"), reply_to=sent(99)[99]),
    ]
    found = in_order(tasks, match_replies(tasks, replies))
    assert found[7].content is not None and found[7].bytes_up > 0
    assert (found[8].failure, found[9].failure) == (
        "the site's app failed",
        "the site could not be reached in time",
    )
    assert found[10].timed_out and not found[8].timed_out
    assert list(found) == [7, 8, 9, 10]


def test_only_a_type_name_of_a_site_is_repeated() -> None:
    tasks = sent(7, 8, 9)
    replies = [
        Message(Error(100, "FileNotFoundError"), reply_to=tasks[7]),
        Message(Error(100, "/data/patient-7.png"), reply_to=tasks[8]),
        Message(Error(2, "BundleNotApproved"), reply_to=tasks[9]),
    ]
    found = in_order(tasks, match_replies(tasks, replies))
    assert (found[7].failure, found[8].failure) == ("FileNotFoundError", "error 100")
    assert found[9].failure == "the site's app failed: BundleNotApproved"


counts = st.lists(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1)


@given(counts)
def test_pooled_accuracy_is_right_answers_over_images(right_of: list[tuple[int, int]]) -> None:
    told = {
        str(i): Evaluation(
            accuracy=right / n, balanced_accuracy=0.5, auroc=NAN, f1=0.5, ece=0.0, test_examples=n
        )
        for i, (right, n) in enumerate(right_of)
    }
    pooled = aggregate_metrics(told)
    assert pooled["accuracy"] == sum(right for right, _ in right_of) / sum(n for _, n in right_of)
    assert "auroc" not in pooled


def test_a_metric_is_the_mean_of_the_sites_that_have_it() -> None:
    def one(auroc: float, n: int) -> Evaluation:
        accuracy = 1.0 if n else NAN
        return Evaluation(
            accuracy=accuracy, balanced_accuracy=NAN, auroc=auroc, f1=NAN, ece=NAN, test_examples=n
        )

    pooled = aggregate_metrics({"a": one(0.5, 10), "b": one(NAN, 100), "c": one(1.0, 30), "d": one(NAN, 0)})
    assert pooled == {"auroc": 0.875, "accuracy": 1.0, "test_examples": 140}
    assert aggregate_metrics({"d": one(NAN, 0)}) == {"test_examples": 0}


START = np.array([1.0, -2.0, 0.5], np.float32)


def drifts(*told: tuple[list[float], int]) -> list[dict[str, float]]:
    """The drift of sites with these changes and weights, from START."""
    changes = {node: np.array(change, np.float32) for node, (change, _) in enumerate(told)}
    replies = {
        node: ValidUpdate(
            update_norm=float(np.linalg.norm(changes[node].astype(float))),
            shift_norm=float(np.linalg.norm(START.astype(float) + changes[node])),
            weight=weight,
            reply=None,  # type: ignore[arg-type]
        )
        for node, (_, weight) in enumerate(told)
    }
    return list(drift(replies, changes, weighted_mean_update(replies, changes)).values())


def test_drift_is_measured_from_the_rounds_model_and_against_the_weighted_mean() -> None:
    # The mean change is (3 (2, 0, 0) + 1 (0, 2, 0)) / 4 = (1.5, 0.5, 0).
    first, second = drifts(([2, 0, 0], 3), ([0, 2, 0], 1))
    assert first["update_norm"] == second["update_norm"] == 2
    assert first["update_cosine"] == pytest.approx(3 / math.sqrt(10))
    assert second["update_cosine"] == pytest.approx(1 / math.sqrt(10))
    assert first["shift_norm"] == pytest.approx(math.sqrt(9 + 4 + 0.25))


def test_a_change_without_direction_has_no_cosine() -> None:
    still, moved = drifts(([0, 0, 0], 1), ([0, 0, 4], 1))
    assert "update_cosine" not in still and still["update_norm"] == 0 and moved["update_cosine"] == 1
    opposite = drifts(([1, 0, 0], 1), ([-1, 0, 0], 1))
    assert [one.keys() for one in opposite] == [{"update_norm", "shift_norm"}] * 2


vectors = st.lists(st.integers(-1000, 1000).map(float), min_size=3, max_size=3)


@given(st.lists(st.tuples(vectors, st.integers(1, 500)), min_size=1, max_size=6))
def test_of_all_sites_changes_the_parts_along_the_mean_add_up_to_it(told: list[tuple[Any, int]]) -> None:
    found = drifts(*told)
    weights = [weight for _, weight in told]
    mean = np.linalg.norm(np.average([change for change, _ in told], axis=0, weights=weights))
    along = [one["update_norm"] * one.get("update_cosine", 0.0) for one in found]
    assert np.average(along, weights=weights) == pytest.approx(mean, abs=1e-3)
    assert all(-1 <= one.get("update_cosine", 0.0) <= 1 for one in found)


class FakeExchange:
    """Node id -> (name, fingerprint JSON), who is online, and how often each was asked."""

    def __init__(self, sites: dict[int, tuple[str, str]]) -> None:
        self.sites, self.asked = sites, []

    def online(self) -> set[int]:
        return set(self.sites)

    def ask(self, tasks: Any, *, kind: str, timeout: float, group: str = "") -> Any:
        self.asked += list(tasks)
        replies = []
        messages = sent(*tasks)
        for node in tasks:
            name, fingerprint = self.sites[node]
            reply = HandshakeReply(protocol=PROTOCOL, site=name, fingerprint=fingerprint, version="0.2.0rc1")
            replies.append(Message(to_record(reply), reply_to=messages[node]))
        return match_replies(messages, replies)


def test_the_roster_takes_in_late_comers_and_keeps_names_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunDir.create(tmp_path / "run", STUDY)
    good = FINGERPRINT.to_json()
    exchange = FakeExchange({1: ("north", good), 2: ("south", "not json"), 3: ("north", good)})
    roster = SiteManager(exchange, folder, StudyConfig.from_yaml(STUDY), FINGERPRINT)  # type: ignore[arg-type]
    assert roster.available() == {1: "north"}
    reasons = {(e["site"], e["reason"]) for e in folder.events() if e["kind"] == "site_refused"}
    assert reasons == {
        ("south", "the site's fingerprint does not read"),
        ("north", "another site is already called 'north'"),
    }
    # A refused site is not asked again at once, a new one is, and one that came back keeps its name.
    exchange.sites = {2: ("south", good), 4: ("north", good)}
    assert roster.available() == {4: "north"}
    assert exchange.asked == [1, 2, 3, 4]
    ready = [e for e in folder.events() if e["kind"] == "site_ready"]
    assert [e["version"] for e in ready] == ["0.2.0rc1"] * 2
    monkeypatch.setattr(roster_of, "RETRY_S", 0.0)
    roster._ask_again.clear()
    assert roster.available() == {4: "north", 2: "south"}


@pytest.mark.parametrize(("back_after", "waited"), [(12, 12), (1000, 30)])
def test_a_round_waits_a_moment_for_a_site_that_went_away_and_only_once(
    back_after: int, waited: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = FINGERPRINT.to_json()
    all_three = {1: ("east", good), 2: ("north", good), 3: ("south", good)}
    exchange, clock = FakeExchange(all_three), [100.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] >= 100 + back_after:
            exchange.sites = all_three

    monkeypatch.setattr(roster_of.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(roster_of.time, "sleep", sleep)
    folder = RunDir.create(tmp_path / "run", STUDY)
    roster = SiteManager(exchange, folder, study("fedavg"), FINGERPRINT)  # type: ignore[arg-type]
    assert set(roster.wait_for_sites()) == {1, 2, 3}
    exchange.sites = {1: ("east", good), 2: ("north", good)}
    assert set(roster.wait_for_sites()) == ({1, 2, 3} if back_after == waited else {1, 2})
    assert clock[0] == 100 + waited
    roster.wait_for_sites()
    assert clock[0] == 100 + waited


def test_a_node_that_never_answers_the_handshake_is_asked_ever_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, clock = FINGERPRINT.to_json(), [100.0]

    class OneSilent(FakeExchange):
        def ask(self, tasks: Any, *, kind: str, timeout: float, group: str = "") -> Any:
            silent = {node for node in tasks if node == 3}
            yield from super().ask(
                {n: task for n, task in tasks.items() if n not in silent}, kind=kind, timeout=timeout
            )
            if silent:
                clock[0] += timeout
                yield SiteReply(node=3, bytes_down=0, timed_out=True)

    monkeypatch.setattr(roster_of.time, "monotonic", lambda: clock[0])
    exchange = OneSilent({1: ("east", good), 2: ("north", good), 3: ("south", good)})
    folder = RunDir.create(tmp_path / "run", STUDY)
    plain = study("fedavg")
    patient = replace(plain, federation=replace(plain.federation, round_timeout_s=600))
    roster = SiteManager(exchange, folder, patient, FINGERPRINT)  # type: ignore[arg-type]
    waits = []
    for _ in range(30):  # rounds of a minute each
        before = clock[0]
        assert set(roster.wait_for_sites()) == {1, 2}
        waits.append(clock[0] - before)
        clock[0] += 60
    # At first a site may have its basis to compute; then it is a minute, after 2, 4, 8 and 16 minutes.
    assert [wait for wait in waits if wait] == [600, 60, 60, 60]
    (refused,) = [e for e in folder.events() if e["kind"] == "site_refused"]
    assert refused["reason"] == "it did not answer the handshake in time"


def test_at_a_server_a_site_is_who_its_node_says(tmp_path: Path) -> None:
    """Else a site could take another's place by its name."""

    class Nodes:
        def problem(self, node: int, name: str) -> str:
            return "" if (node, name) == (1, "north") else "its node belongs to site 'south'"

    folder, good = RunDir.create(tmp_path / "run", STUDY), FINGERPRINT.to_json()
    exchange = FakeExchange({2: ("north", good), 1: ("north", good)})
    study = StudyConfig.from_yaml(STUDY)
    roster = SiteManager(exchange, folder, study, FINGERPRINT, Nodes())  # type: ignore[arg-type]
    assert roster.available() == {1: "north"}
    (refused,) = [e for e in folder.events() if e["kind"] == "site_refused"]
    assert refused["reason"] == "its node belongs to site 'south'"


def study(strategy: str, **options: Any) -> StudyConfig:
    federation = f"{{strategy: {strategy}, options: {options}}}"
    return StudyConfig.from_yaml(f"{{name: s, backbone: b, classes: [a, b], federation: {federation}}}")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_built_by_name(name: str) -> None:
    assert type(make_averaging(study(name))).__name__.lower() == name


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedtrimmedavg", {"beta": 0.5}, r"options\.beta is 0\.5, expected a number between 0 and 0\.499999"),
        ("fedadam", {"eta": "big"}, r"federation\.options\.eta is 'big', expected a number"),
        ("fedadam", {"eta": -1}, "eta is -1, expected a number between 1e-09"),
        ("fedadam", {"beta_1": 1}, "beta_1 is 1, expected a number between 0 and 0.999999"),
        ("fedyogi", {"tau": 0}, "tau is 0"),
        ("fedavgm", {"server_momentum": True}, "server_momentum is True, expected a number"),
        ("fedprox", {"proximal_mu": "x"}, "proximal_mu is 'x'"),
        ("qfedavg", {"client_learning_rate": 0}, "client_learning_rate is 0"),
        ("krum", {"num_malicious_nodes": -3}, "num_malicious_nodes is -3"),
        ("krum", {"num_malicious_nodes": 1.0}, "num_malicious_nodes is 1.0, expected a whole number"),
        ("multikrum", {"num_nodes_to_select": 0}, "num_nodes_to_select is 0"),
        ("fedadam", {"etta": 1}, "did you mean 'eta'"),
        ("fedavg", {"weighted_by_key": "x"}, "fedavg has no options"),
        ("fedavgm", {"min_train_nodes": 1}, "not an option of fedavgm"),
    ],
)
def test_options_are_checked_before_anything_starts(name: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_averaging(study(name, **options))


@pytest.mark.parametrize(
    ("name", "options", "option", "first"),
    [
        ("fedadam", {"eta": 0.2}, "eta", 0.2),
        ("fedyogi", {}, "eta", 0.01),
        ("fedavgm", {"server_learning_rate": 0.5}, "server_learning_rate", 0.5),
    ],
)
def test_the_servers_step_follows_a_cosine_over_all_rounds(
    name: str, options: dict, option: str, first: float
) -> None:
    plain = study(name, **options)
    fading = replace(plain, federation=replace(plain.federation, schedule="cosine", rounds=4))
    averaging = make_averaging(fading)
    steps = []
    for number in (1, 2, 3, 4, 2):  # a resumed run may begin anywhere
        set_step(averaging, fading, number)
        steps.append(getattr(averaging, option))
    shares = [1.0, 0.5 + 2**0.5 / 4, 0.5, 0.5 - 2**0.5 / 4, 0.5 + 2**0.5 / 4]
    assert steps == pytest.approx([first * share for share in shares])
    set_step(averaging, plain, 3)
    assert getattr(averaging, option) == steps[-1]  # nothing is set where the schedule is constant


def test_fedavgms_step_is_made_by_schedule_if_it_begins_at_one_without_momentum() -> None:
    """Flower's FedAvgM looks once, when it is built, whether it has a step at all."""
    plain = study("fedavgm")
    fading = replace(plain, federation=replace(plain.federation, schedule="cosine", rounds=4))
    start, there = np.zeros(3), np.ones(3, np.float32)
    for of, wanted in ((fading, 0.5), (plain, 1.0)):
        found = _Strategy(of).of_round(3, [1.0, 1.0])(start, [there, there], [1, 3])
        assert found.tolist() == pytest.approx([wanted] * 3)


def test_momentum_is_kept_and_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "strategy-3.safetensors"
    one, other = make_averaging(study("fedadam")), make_averaging(study("fedadam"))
    save_state(one, path)
    assert not path.exists()  # nothing to keep before the first round
    one.m_t, one.v_t = {"shift": np.ones(4)}, {"shift": np.full(4, 2.0)}  # type: ignore[attr-defined]
    save_state(one, path)
    restore_state(other, path, size=4)
    assert other.v_t["shift"].tolist() == [2.0] * 4  # type: ignore[attr-defined]
    with pytest.raises(StateError, match="not of this study"):
        restore_state(other, path, size=5)
    path.write_bytes(b"no safetensors")
    with pytest.raises(StateError, match="cannot be read"):
        restore_state(other, path, size=4)
