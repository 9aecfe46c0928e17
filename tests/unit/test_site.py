"""A real site: its site.yaml bounds what it does, whatever a message asks for."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Message
from numpy import zeros

from fedsigma import __version__
from fedsigma.client.app import app as client
from fedsigma.client.site import site as client_site
from fedsigma.client.site.identity import new_identity
from fedsigma.client.site.image_cache import IMAGES
from fedsigma.client.site.policy import SitePolicy
from fedsigma.client.site.privacy_ledger import PrivacyLedger
from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import LocalTrainingConfig
from fedsigma.common.data.loading import SiteData
from fedsigma.common.data.records import Record
from fedsigma.common.data.sampling import in_turns
from fedsigma.common.data.sources import site_data
from fedsigma.common.privacy import secure_aggregation
from fedsigma.common.privacy.accounting import PrivacyEvent, epsilon
from fedsigma.common.privacy.secure_aggregation import Member
from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.common.wire import records as protocol
from fedsigma.common.wire.codec import encode
from fedsigma.common.wire.records import (
    EvaluateReply,
    EvaluateTask,
    HandshakeReply,
    HandshakeRequest,
    StudySpec,
    TrainReply,
    TrainTask,
)
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.fake_trainer import FINGERPRINT, LAYOUT, STUDY, fake_method  # noqa: F401

pytestmark = pytest.mark.usefixtures("fake_method")

POLICY = """
name: barcelona
source: folder:images
studies: [fake]
backbones: {fake: local-dir:/models/fake}
max_local_steps: 10
"""
SETUP = StudySpec.of(StudyConfig.from_yaml(STUDY))
TASK = TrainTask(
    study=SETUP,
    recipe=LocalTrainingConfig(),
    mode="round",
    round=1,
    cohort=3,
    first_step=0,
    steps=5,
    total_steps=15,
    codec="exact",
    evaluate=True,
    shift=encode(zeros(LAYOUT.size), LAYOUT),
)


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Send one task to a real site with this policy, and return its reply."""
    opened = []

    def open_source(spec: str, **options: Any) -> Any:
        opened.append((spec, options["base"]))
        return "source"

    monkeypatch.setattr("fedsigma.common.data.sources.registry.open_source", open_source)
    monkeypatch.setattr(site_data, "usable_records", lambda source, **options: ["record"])

    def send(task: object, kind: str = "train", policy: str = POLICY, *, run_id: int = 1) -> Message:
        IMAGES.reset()  # as in a process of its own
        file = tmp_path / "site.yaml"
        file.write_text(policy)
        grid = FakeGrid(client, 1, node_config={"site-config": str(file)}, run_id=run_id)
        message = Message(protocol.to_record(task), dst_node_id=100, message_type=kind)
        return grid.send_and_receive([message])[0]

    send.opened = opened  # type: ignore[attr-defined]
    return send


def test_a_real_site_uses_its_own_images_name_and_backbone(ask: Any, tmp_path: Path) -> None:
    hello = HandshakeRequest(protocol=protocol.PROTOCOL, study=SETUP, fingerprint=FINGERPRINT.to_json())
    reply = protocol.from_record(HandshakeReply, ask(hello, protocol.HANDSHAKE).content)
    assert (reply.site, reply.sites, reply.problem) == ("barcelona", 0, "")
    # The message's data section names the demonstration set; a real site never opens it.
    reply = protocol.from_record(TrainReply, ask(TASK).content)
    assert ask.opened == [("folder:images", tmp_path)]
    assert reply.class_counts == ()
    assert (tmp_path / "audit.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 11}, "TooManySteps"),
        ({"cohort": 1}, "CohortTooSmall"),
        ({"mode": "local", "cohort": 1}, "CohortTooSmall"),
        ({"study": dataclasses.replace(SETUP, name="other")}, "StudyNotAllowed"),
        ({"study": dataclasses.replace(SETUP, backbone="hf-hub:evil/model")}, "BackboneNotAllowed"),
        ({"shift": b"\0" * 100}, "CodecError"),
    ],
)
def test_tasks_beyond_the_policy_are_refused(ask: Any, tmp_path: Path, change: dict, reason: str) -> None:
    reply = ask(dataclasses.replace(TASK, **change))
    assert reply.has_error() and reply.error.reason == reason
    assert reason in (tmp_path / "audit.jsonl").read_text()


def test_class_counts_are_shared_only_if_the_policy_allows_it(ask: Any) -> None:
    reported = ask(TASK, policy=POLICY + "share_class_counts: true\n")
    assert protocol.from_record(TrainReply, reported.content).class_counts == (1, 1)


def test_confusion_matrices_are_shared_only_if_the_policy_allows_it(ask: Any) -> None:
    task = EvaluateTask(study=SETUP, round=1, shifts=(TASK.shift, TASK.shift))
    quiet = protocol.from_record(EvaluateReply, ask(task, "evaluate").content)
    assert len(quiet.evaluations) == 2 and quiet.confusions == ()
    reported = protocol.from_record(
        EvaluateReply, ask(task, "evaluate", POLICY + "share_confusion: true\n").content
    )
    assert len(reported.confusions) == 2 * 4
    assert sum(reported.confusions[:4]) == reported.evaluations[0].test_examples


def test_a_node_without_site_yaml_or_partition_says_nothing(ask: Any, tmp_path: Path) -> None:
    grid = FakeGrid(client, 1)
    grid.contexts[100].node_config.clear()
    message = Message(protocol.to_record(TASK), dst_node_id=100, message_type="train")
    (reply,) = grid.send_and_receive([message])
    assert reply.error.reason == "ConfigError"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x", "'source', 'studies' is missing"),
        (POLICY + "max_steps: 1", "did you mean 'max_local_steps'?"),
        (POLICY + "min_cohort: 0", "min_cohort is 0"),
        (POLICY.replace("barcelona", ALL_SITES), f"not '{ALL_SITES}'"),
        (POLICY.replace("local-dir:/models/fake", "3"), "backbones.fake is 3, expected text"),
    ],
)
def test_a_site_yaml_is_read_strictly(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        SitePolicy.read(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        SitePolicy.read(tmp_path / "missing.yaml")


def test_an_identity_is_created_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    public = new_identity(tmp_path / "identity.pem")
    assert re.fullmatch("[0-9a-f]{64}", public)
    assert (tmp_path / "identity.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError, match="exists and is not overwritten"):
        new_identity(tmp_path / "identity.pem")
    with pytest.raises(FileNotFoundError, match="is not a folder: create it first"):
        new_identity(tmp_path / "none" / "identity.pem")


def test_a_real_site_signs_its_key_and_knows_its_peers_by_its_own_file(ask: Any, tmp_path: Path) -> None:
    mine = new_identity(tmp_path / "identity.pem")
    north = Ed25519PrivateKey.generate()
    known = north.public_key().public_bytes_raw().hex()
    policy = POLICY + f"identity: identity.pem\npeers: {{north: '{known}'}}\nrequire_masking: true\n"
    hello = HandshakeRequest(protocol=protocol.PROTOCOL, study=SETUP, fingerprint=FINGERPRINT.to_json())
    said = protocol.from_record(HandshakeReply, ask(hello, protocol.HANDSHAKE, policy).content)
    own = Member(name="barcelona", key=said.mask_key, signature=said.mask_signature)
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    other = secure_aggregation.sign(north, run=1, name="north", key=key)
    place = secure_aggregation.MaskContext(
        run=1, round=1, attempt=0, members=(own, other), bound=1.0, most_examples=1
    )
    everyone = {"barcelona": bytes.fromhex(mine), "north": bytes.fromhex(known)}
    secure_aggregation.check_members(place, everyone, me="barcelona", key=own.key)
    assert ask(TASK, "train", policy).error.reason == "NotMasked"
    masked = dataclasses.replace(TASK, cohort=2, members=(own, other), bound=16.0, most_examples=100)
    assert ask(masked, "train", policy).has_content()
    # In another run the site has another key: the cohort names one that is not its own.
    assert ask(masked, "train", policy, run_id=2).error.reason == "MaskingError"
    (stored,) = (tmp_path / "personal" / "masks").glob("*-1.masks")
    assert stored.stat().st_mode & 0o777 == 0o600
    stored.write_bytes(stored.read_bytes()[:40])
    assert ask(masked, "train", policy).error.reason == "MaskFileDamaged"


def test_without_an_identity_a_site_offers_no_key(ask: Any) -> None:
    hello = HandshakeRequest(protocol=protocol.PROTOCOL, study=SETUP, fingerprint=FINGERPRINT.to_json())
    said = protocol.from_record(HandshakeReply, ask(hello, protocol.HANDSHAKE).content)
    assert (said.mask_key, said.mask_signature) == (b"", b"")


@pytest.mark.parametrize(("line", "explained"), [("", False), ("allow_explanation: true\n", True)])
def test_site_states_whether_its_shift_may_be_explained(ask: Any, line: str, explained: bool) -> None:
    hello = HandshakeRequest(protocol=protocol.PROTOCOL, study=SETUP, fingerprint=FINGERPRINT.to_json())
    said = protocol.from_record(HandshakeReply, ask(hello, protocol.HANDSHAKE, POLICY + line).content)
    assert (said.allow_explanation, said.version) == (explained, __version__)


def test_invalid_peer_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(POLICY + "peers: {north: abc}\n")
    with pytest.raises(ConfigError, match=r"peers\.north is 'abc', expected 64 hex digits"):
        SitePolicy.read(file)


def hiding(level: str, noise: float = 4.0, epsilon: float = 1e6) -> TrainTask:
    requested = PrivacyConfig(level=level, noise_multiplier=noise, epsilon=epsilon)
    return dataclasses.replace(TASK, privacy=requested)


@pytest.mark.parametrize(
    ("policy", "level", "reason"),
    [
        ("none", "none", ""),
        ("none", "image", ""),
        ("image", "none", "NotPrivate"),
        ("image", "site", "NotPrivate"),
        ("image", "image", ""),
        ("image", "group", ""),
        ("group", "image", "NotPrivate"),
    ],
)
def test_training_must_hide_what_the_site_demands(ask: Any, policy: str, level: str, reason: str) -> None:
    reply = ask(hiding(level), policy=f"{POLICY}privacy: {policy}\n")
    assert reply.has_error() == bool(reason)
    assert not reason or reply.error.reason == reason


def test_the_sites_own_budget_holds_whatever_the_server_says(ask: Any, tmp_path: Path) -> None:
    policy = POLICY.replace("[fake]", "['*']") + "privacy: image\nepsilon: 5\nledger: deep/spent.jsonl\n"
    event = PrivacyEvent(rate=1.0, noise_multiplier=4.0, steps=5)
    allowed = next(n for n in range(1, 99) if epsilon([event] * (n + 1), 1e-5) > 5)
    reported = []
    for number in range(allowed + 1):
        # Another study each time, with a budget of its own that allows anything.
        setup = dataclasses.replace(SETUP, name=f"study-{number}")
        reported.append(ask(dataclasses.replace(hiding("image"), study=setup), policy=policy))
    assert [reply.has_error() for reply in reported] == [False] * allowed + [True]
    assert reported[-1].error.reason == "PrivacyBudgetSpent"
    assert len(PrivacyLedger(tmp_path / "deep" / "spent.jsonl").entries()) == allowed
    reply = protocol.from_record(TrainReply, reported[0].content)
    assert reply.epsilon == epsilon([event], 1e-5) and math.isnan(reply.loss)


def test_class_counts_are_not_shared_with_private_training(ask: Any) -> None:
    policy = POLICY + "share_class_counts: true\n"
    assert protocol.from_record(TrainReply, ask(TASK, policy=policy).content).class_counts == (1, 1)
    assert protocol.from_record(TrainReply, ask(hiding("image"), policy=policy).content).class_counts == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("privacy: site", "privacy is 'site'"),
        ("epsilon: 3", "epsilon is 3, and privacy 'none' allows studies that spend"),
        ("privacy: image\nepsilon: 0", "epsilon is 0"),
        ("delta: 0", "delta is 0"),
    ],
)
def test_a_wrong_privacy_in_site_yaml_is_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(f"{POLICY}{line}\n")
    with pytest.raises(ConfigError, match=words):
        SitePolicy.read(tmp_path / "site.yaml")


def test_the_split_of_a_site_is_its_own_and_not_a_studys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one study trained on must not be what another is judged on, by another seed."""
    file = tmp_path / "site.yaml"
    file.write_text(POLICY)
    seeds = []

    def usable(source: object, **options: Any) -> list[str]:
        seeds.append(options["seed"])
        return ["record"]

    monkeypatch.setattr("fedsigma.common.data.sources.registry.open_source", lambda spec, **options: "source")
    monkeypatch.setattr(site_data, "usable_records", usable)
    monkeypatch.setattr(
        site_data, "load_site", lambda *args, **options: SiteData(name="s", train=[], test=[])
    )
    site = client_site.open_site({"site-config": str(file)}, SETUP, run="run-1")
    for seed in (1, 2):
        site.images(dataclasses.replace(SETUP, seed=seed), side=8)
    assert len(seeds) == 2 and len(set(seeds)) == 1


def test_what_is_cut_off_at_most_examples_is_of_all_classes() -> None:
    records = [Record(key=f"{label}{n}", label=label, split="train") for label in "abc" for n in range(4)]
    stored = in_turns(records, key=lambda record: record.label)[:5]
    assert [record.label for record in stored] == ["a", "b", "c", "a", "b"]


def test_a_site_limits_the_evaluated_models_of_a_study(ask: Any, tmp_path: Path) -> None:
    policy = POLICY + "max_evaluations: 5\n"
    shift = encode(zeros(LAYOUT.size), LAYOUT)
    two = EvaluateTask(study=SETUP, round=1, shifts=(shift, shift))
    for run_id in (1, 2):  # over all runs
        assert ask(two, "evaluate", policy, run_id=run_id).has_content()
    assert ask(two, "evaluate", policy, run_id=3).error.reason == "TooManyEvaluations"
    assert ask(dataclasses.replace(TASK, evaluate=True), "train", policy).has_content()
    assert ask(dataclasses.replace(TASK, evaluate=True), "train", policy).error.reason == "TooManyEvaluations"
    assert ask(dataclasses.replace(TASK, evaluate=False), "train", policy).has_content()
    assert [line["models"] for line in HashChainedLog(tmp_path / "evaluations.jsonl").lines()] == [2, 2, 1]
