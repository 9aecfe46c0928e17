"""Matching of replies, metrics over all sites, the site manager and the aggregation rules."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given
from hypothesis import strategies as st

from bench.methods.federation import VectorAggregator
from fedsigma.common.config.federation import STRATEGIES
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.ops.flower_compat import set_message_id
from fedsigma.common.wire.records import PROTOCOL, Evaluation, HandshakeReply, to_record
from fedsigma.server.federation import site_manager
from fedsigma.server.federation.aggregation import (
    Aggregator,
    OptimizerStateError,
    update_statistics,
    weighted_mean_update,
)
from fedsigma.server.federation.messenger import SiteReply, match_replies
from fedsigma.server.federation.site_manager import SiteManager
from fedsigma.server.federation.validation import SiteUpdate, aggregate_metrics
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import FakeGrid, gone
from tests.helpers.fake_trainer import FINGERPRINT, STUDY

NAN = math.nan


def sent(*nodes: int) -> dict[int, Message]:
    FakeGrid(None, 0)  # gives this process an identity, without which there are no messages
    messages = {node: Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes}
    for node, message in messages.items():
        set_message_id(message, f"to-{node}")
    return messages


def test_every_failure_is_matched_to_its_site() -> None:
    tasks = sent(7, 8, 9, 10)
    content = to_record(HandshakeReply(protocol=PROTOCOL, site="x", fingerprint="", version="0.1.0"))
    replies = [
        gone(tasks[9], code=3),
        Message(Error(2, "secret text"), reply_to=tasks[8]),
        Message(content, reply_to=tasks[7]),
        Message(Error(2, "a second reply"), reply_to=tasks[7]),
        Message(Error(2, "never asked"), reply_to=sent(99)[99]),
    ]
    by_node = {reply.node: reply for reply in match_replies(tasks, replies)}
    assert by_node[7].content is not None and by_node[7].bytes_up > 0
    assert (by_node[8].failure, by_node[9].failure) == (
        "the site's app failed",
        "the site could not be reached in time",
    )
    assert by_node[10].timed_out and not by_node[8].timed_out
    assert sorted(by_node) == [7, 8, 9, 10]


def test_of_a_sites_error_only_a_type_name_is_kept() -> None:
    tasks = sent(7, 8, 9)
    replies = [
        Message(Error(100, "FileNotFoundError"), reply_to=tasks[7]),
        Message(Error(100, "/data/patient-7.png"), reply_to=tasks[8]),
        Message(Error(2, "BundleNotApproved"), reply_to=tasks[9]),
    ]
    by_node = {reply.node: reply for reply in match_replies(tasks, replies)}
    assert (by_node[7].failure, by_node[8].failure) == ("FileNotFoundError", "error 100")
    assert by_node[9].failure == "the site's app failed: BundleNotApproved"


counts = st.lists(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1)


@given(counts)
def test_accuracy_over_all_sites_is_correct_predictions_over_images(
    counts_of_sites: list[tuple[int, int]],
) -> None:
    evaluations = {
        str(i): Evaluation(
            accuracy=correct / n, balanced_accuracy=0.5, auroc=NAN, f1=0.5, ece=0.0, test_examples=n
        )
        for i, (correct, n) in enumerate(counts_of_sites)
    }
    metrics = aggregate_metrics(evaluations.values())
    assert metrics["accuracy"] == sum(correct for correct, _ in counts_of_sites) / sum(
        n for _, n in counts_of_sites
    )
    assert "auroc" not in metrics


def test_a_metric_is_the_mean_of_the_sites_that_have_it() -> None:
    def one(auroc: float, n: int) -> Evaluation:
        accuracy = 1.0 if n else NAN
        return Evaluation(
            accuracy=accuracy, balanced_accuracy=NAN, auroc=auroc, f1=NAN, ece=NAN, test_examples=n
        )

    pooled = aggregate_metrics([one(0.5, 10), one(NAN, 100), one(1.0, 30), one(NAN, 0)])
    assert pooled == {"auroc": 0.875, "accuracy": 1.0, "test_examples": 140}
    assert aggregate_metrics([one(NAN, 0)]) == {"test_examples": 0}


START = np.array([1.0, -2.0, 0.5], np.float32)


def statistics_of(*sites: tuple[list[float], int]) -> list[dict[str, float]]:
    """The statistics of sites with these updates and weights, from START."""
    vectors_by_node = {node: np.array(vector, np.float32) for node, (vector, _) in enumerate(sites)}
    updates = {
        node: SiteUpdate(
            site=str(node),
            reply=SiteReply(node=node, bytes_down=0),
            update_norm=float(np.linalg.norm(vector.astype(float))),
            shift_norm=float(np.linalg.norm(START.astype(float) + vector)),
        )
        for node, vector in vectors_by_node.items()
    }
    mean = weighted_mean_update({node: weight for node, (_, weight) in enumerate(sites)}, vectors_by_node)
    return list(update_statistics(updates, vectors_by_node, mean).values())


def test_update_statistics_relate_to_the_global_shift_and_the_weighted_mean() -> None:
    # The mean change is (3 (2, 0, 0) + 1 (0, 2, 0)) / 4 = (1.5, 0.5, 0).
    first, second = statistics_of(([2, 0, 0], 3), ([0, 2, 0], 1))
    assert first["update_norm"] == second["update_norm"] == 2
    assert first["update_cosine"] == pytest.approx(3 / math.sqrt(10))
    assert second["update_cosine"] == pytest.approx(1 / math.sqrt(10))
    assert first["shift_norm"] == pytest.approx(math.sqrt(9 + 4 + 0.25))


def test_a_zero_update_has_no_cosine() -> None:
    still, moved = statistics_of(([0, 0, 0], 1), ([0, 0, 4], 1))
    assert "update_cosine" not in still and still["update_norm"] == 0 and moved["update_cosine"] == 1
    opposite = statistics_of(([1, 0, 0], 1), ([-1, 0, 0], 1))
    assert [one.keys() for one in opposite] == [{"update_norm", "shift_norm"}] * 2


vectors = st.lists(st.integers(-1000, 1000).map(float), min_size=3, max_size=3)


@given(st.lists(st.tuples(vectors, st.integers(1, 500)), min_size=1, max_size=6))
def test_the_updates_parts_along_the_mean_average_to_its_norm(sites: list[tuple[Any, int]]) -> None:
    statistics = statistics_of(*sites)
    weights = [weight for _, weight in sites]
    mean = np.linalg.norm(np.average([update for update, _ in sites], axis=0, weights=weights))
    along = [row["update_norm"] * row.get("update_cosine", 0.0) for row in statistics]
    assert np.average(along, weights=weights) == pytest.approx(mean, abs=1e-3)
    assert all(-1 <= row.get("update_cosine", 0.0) <= 1 for row in statistics)


class FakeMessenger:
    """Sites that are online: node id -> (name, fingerprint JSON); `asked` records every handshake."""

    def __init__(self, sites: dict[int, tuple[str, str]]) -> None:
        self.sites, self.asked = sites, []

    def online(self) -> set[int]:
        return set(self.sites)

    def send_tasks(self, nodes: Any, task: Any, *, kind: str, timeout: float, group: str = "") -> Any:
        self.asked += list(nodes)
        replies = []
        messages = sent(*nodes)
        for node in nodes:
            name, fingerprint = self.sites[node]
            reply = HandshakeReply(protocol=PROTOCOL, site=name, fingerprint=fingerprint, version="0.2.0rc1")
            replies.append(Message(to_record(reply), reply_to=messages[node]))
        return match_replies(messages, replies)


def test_the_site_manager_accepts_late_sites_and_refuses_duplicate_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunDir.create(tmp_path / "run", STUDY)
    good = FINGERPRINT.to_json()
    messenger = FakeMessenger({1: ("north", good), 2: ("south", "not json"), 3: ("north", good)})
    manager = SiteManager(messenger, folder, StudyConfig.from_yaml(STUDY), FINGERPRINT)  # type: ignore[arg-type]
    assert manager.available() == {1: "north"}
    reasons = {(e["site"], e["reason"]) for e in folder.events() if e["kind"] == "site_refused"}
    assert reasons == {
        ("south", "the site's fingerprint cannot be parsed"),
        ("north", "another site is already called 'north'"),
    }
    # A refused site is not asked again at once, a new one is, and one that came back keeps its name.
    messenger.sites = {2: ("south", good), 4: ("north", good)}
    assert manager.available() == {4: "north"}
    assert messenger.asked == [1, 2, 3, 4]
    ready = [e for e in folder.events() if e["kind"] == "site_ready"]
    assert [e["version"] for e in ready] == ["0.2.0rc1"] * 2
    monkeypatch.setattr(site_manager, "RETRY_S", 0.0)
    manager._next_handshake.clear()
    assert manager.available() == {4: "north", 2: "south"}


@pytest.mark.parametrize(("back_after", "waited"), [(12, 12), (1000, 30)])
def test_a_round_waits_once_for_a_site_that_went_offline(
    back_after: int, waited: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = FINGERPRINT.to_json()
    all_three = {1: ("east", good), 2: ("north", good), 3: ("south", good)}
    messenger, clock = FakeMessenger(all_three), [100.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] >= 100 + back_after:
            messenger.sites = all_three

    monkeypatch.setattr(site_manager.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(site_manager.time, "sleep", sleep)
    folder = RunDir.create(tmp_path / "run", STUDY)
    manager = SiteManager(messenger, folder, study("fedavg"), FINGERPRINT)  # type: ignore[arg-type]
    assert set(manager.wait_for_sites()) == {1, 2, 3}
    messenger.sites = {1: ("east", good), 2: ("north", good)}
    assert set(manager.wait_for_sites()) == ({1, 2, 3} if back_after == waited else {1, 2})
    assert clock[0] == 100 + waited
    manager.wait_for_sites()
    assert clock[0] == 100 + waited


def test_handshakes_with_a_silent_node_back_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, clock = FINGERPRINT.to_json(), [100.0]

    class OneSilent(FakeMessenger):
        def send_tasks(self, nodes: Any, task: Any, *, kind: str, timeout: float, group: str = "") -> Any:
            answering = [node for node in nodes if node != 3]
            yield from super().send_tasks(answering, task, kind=kind, timeout=timeout)
            if 3 in nodes:
                clock[0] += timeout
                yield SiteReply(node=3, bytes_down=0, timed_out=True)

    monkeypatch.setattr(site_manager.time, "monotonic", lambda: clock[0])
    messenger = OneSilent({1: ("east", good), 2: ("north", good), 3: ("south", good)})
    folder = RunDir.create(tmp_path / "run", STUDY)
    plain = study("fedavg")
    patient = replace(plain, federation=replace(plain.federation, round_timeout_s=600))
    manager = SiteManager(messenger, folder, patient, FINGERPRINT)  # type: ignore[arg-type]
    waits = []
    for _ in range(30):  # rounds of a minute each
        before = clock[0]
        assert set(manager.wait_for_sites()) == {1, 2}
        waits.append(clock[0] - before)
        clock[0] += 60
    # At first a site may have its basis to compute; then it is a minute, after 2, 4, 8 and 16 minutes.
    assert [wait for wait in waits if wait] == [600, 60, 60, 60]
    (refused,) = [e for e in folder.events() if e["kind"] == "site_refused"]
    assert refused["reason"] == "it did not answer the handshake in time"


def test_a_sites_name_must_be_that_of_its_node(tmp_path: Path) -> None:
    """Else a site could impersonate another by its name."""

    class Nodes:
        def node_problem(self, node: int, name: str) -> str:
            return "" if (node, name) == (1, "north") else "its node belongs to site 'south'"

    folder, good = RunDir.create(tmp_path / "run", STUDY), FINGERPRINT.to_json()
    messenger = FakeMessenger({2: ("north", good), 1: ("north", good)})
    study = StudyConfig.from_yaml(STUDY)
    manager = SiteManager(messenger, folder, study, FINGERPRINT, Nodes())  # type: ignore[arg-type]
    assert manager.available() == {1: "north"}
    (refused,) = [e for e in folder.events() if e["kind"] == "site_refused"]
    assert refused["reason"] == "its node belongs to site 'south'"


def study(strategy: str, **options: Any) -> StudyConfig:
    federation = f"{{strategy: {strategy}, options: {options}}}"
    return StudyConfig.from_yaml(f"{{name: s, backbone: b, classes: [a, b], federation: {federation}}}")


class Cohort(Grid):
    """A grid of these nodes, for Flower's strategies to sample from; it sends nothing."""

    def __init__(self, nodes: int) -> None:
        self._nodes = range(100, 100 + nodes)

    def get_node_ids(self) -> Any:
        return list(self._nodes)

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    set_run = create_message = get_nodes = push_messages = pull_messages = send_and_receive = _unused
    run = property(_unused)  # type: ignore[assignment]


def flower_strategy(name: str, options: dict[str, Any]) -> Any:
    """Flower's own strategy of this name, which is the reference."""
    if name == "qfedavg":
        options = {"client_learning_rate": 0.01, **options}
    cls = next(cls for cls in vars(flower).values() if getattr(cls, "__name__", "").lower() == name)
    return cls(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in STRATEGIES),
        ("fedavgm", {"server_learning_rate": 0.7}),
        ("fedavgm", {"server_momentum": 0.9, "server_learning_rate": 0.5}),
        ("fedadam", {"eta": 0.02, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2}),
        ("fedyogi", {"eta": 0.02, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2}),
        ("fedtrimmedavg", {"beta": 0.3}),
        ("krum", {"num_malicious_nodes": 1}),
        ("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}),
        ("qfedavg", {"q": 0.5, "client_learning_rate": 0.1}),
    ],
)
def test_four_rounds_equal_flowers_own_strategy_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    FakeGrid(None, 0)  # gives this process an identity, without which there are no messages
    random = np.random.default_rng(5)
    config = study(name, **options)
    ours, reference = Aggregator(config), flower_strategy(name, options)
    shift = random.normal(size=50).astype(np.float32)
    # Flower's qFedAvg collects the process's garbage for each model, which takes a second.
    for number in range(1, 2 if name == "qfedavg" else 5):
        updates = [random.normal(size=50).astype(np.float32) for _ in range(7)]
        weights, losses = random.integers(1, 60, 7).tolist(), random.uniform(0.1, 2, 7).tolist()
        mean = sum(w * u.astype(np.float64) for w, u in zip(weights, updates, strict=True)) / sum(weights)
        # Flower's mean of models is summed in another order, so the optimisers get the mean as one model.
        models = [shift.astype(np.float64) + update for update in updates]
        single = not ours.needs_all_updates
        replies = []
        for node, (model, weight, loss) in enumerate(
            [(shift.astype(np.float64) + mean, 1, 0.0)]
            if single
            else zip(models, weights, losses, strict=True)
        ):
            metrics = MetricRecord({"num-examples": weight, "train_loss": loss})
            content = RecordDict({"arrays": ArrayRecord({"shift": Array(model)}), "metrics": metrics})
            replies.append(Message(content, dst_node_id=100 + node, message_type="train"))
        if name == "fedavgm":
            reference.current_arrays = None  # FedSigma's shift is rounded to float32 for the wire
        arrays = ArrayRecord({"shift": Array(shift.astype(np.float64))})
        list(reference.configure_train(number, arrays, ConfigRecord(), Cohort(len(replies))))
        expected, _ = reference.aggregate_train(number, replies)
        each = zip(updates, weights, losses, strict=True)
        shift = ours.step(shift, mean, each, round=number)
        np.testing.assert_array_equal(shift, expected["shift"].numpy().astype(np.float32))


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_the_mean_update_equals_flowers_mean_of_the_models(seed: int, sites: int) -> None:
    random = np.random.default_rng(seed)
    updates = {node: random.normal(size=20).astype(np.float32) for node in range(sites)}
    weights = {node: int(random.integers(1, 500)) for node in range(sites)}
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({"shift": Array(updates[node].astype(np.float64))}),
                "metrics": MetricRecord({"num-examples": weights[node]}),
            }
        )
        for node in updates
    ]
    expected = aggregate_arrayrecords(records, "num-examples")["shift"].numpy()
    np.testing.assert_allclose(weighted_mean_update(weights, updates), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "message"),
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
def test_invalid_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Aggregator(study(name, **options))


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
    # A resumed run may begin with any round.
    steps = [Aggregator(fading).options(number)[option] for number in (1, 2, 3, 4, 2)]
    shares = [1.0, 0.5 + 2**0.5 / 4, 0.5, 0.5 - 2**0.5 / 4, 0.5 + 2**0.5 / 4]
    assert steps == pytest.approx([first * share for share in shares])
    assert Aggregator(plain).options(3) == options  # nothing is set where the schedule is constant


def test_fedavgm_follows_a_schedule_that_begins_at_one_without_momentum() -> None:
    """Flower's FedAvgM decides once, when it is built, whether it makes a step."""
    plain = study("fedavgm")
    fading = replace(plain, federation=replace(plain.federation, schedule="cosine", rounds=4))
    start, there = np.zeros(3), np.ones(3, np.float32)
    for config, expected in ((fading, 0.5), (plain, 1.0)):
        shift = VectorAggregator(config).rule_of_round(3, [1.0, 1.0])(start, [there, there], [1, 3])
        assert shift.tolist() == pytest.approx([expected] * 3)


def test_optimiser_state_is_saved_and_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "strategy-3.safetensors"
    first, second = Aggregator(study("fedadam")), Aggregator(study("fedadam"))
    first.save_state(path)
    assert not path.exists()  # there is no state before the first round
    first.state = {"first": np.ones(4), "second": np.full(4, 2.0)}
    first.save_state(path)
    second.load_state(path, size=4)
    assert second.state["second"].tolist() == [2.0] * 4
    with pytest.raises(OptimizerStateError, match="not of this study"):
        second.load_state(path, size=5)
    path.write_bytes(b"no safetensors")
    with pytest.raises(OptimizerStateError, match="cannot be read"):
        second.load_state(path, size=4)
