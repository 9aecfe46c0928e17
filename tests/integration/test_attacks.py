"""Hostile and broken sites against the real apps."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedsigma.common.wire.codec import decode, encode
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import Tamper
from tests.helpers.fake_trainer import LAYOUT, NAMES, STUDY, fake_method  # noqa: F401
from tests.integration.test_rounds import events, run, shift_of

pytestmark = pytest.mark.usefixtures("fake_method")
ROUNDS = 4
HOSTILE = 103  # jiangxi, with the most images of all
PLAIN = STUDY.replace("[zero_shot, local_only, pooled]", "[]").replace("rounds: 3", f"rounds: {ROUNDS}")
Values = dict[str, Any]


Change = Callable[[Values, int], Values | None]


def attack(change: Change) -> Tamper:
    """A tamper that changes the hostile site's replies in all rounds."""
    rounds = [0]

    def tamper(node: int, task: Message, reply: Message) -> Message | None:
        if node != HOSTILE or task.metadata.message_type != "train":
            return reply
        rounds[0] += 1
        values = reply.content.config_records["fedsigma"]
        found = change(dict(values), rounds[0])
        if found is None:
            return None
        values.update(found)
        return reply

    return tamper


def moved(by: Callable[[np.ndarray], np.ndarray]) -> Callable[[Values, int], Values]:
    """Send another update than the trained one."""
    return lambda values, _: {"update": encode(by(decode(values["update"], LAYOUT)), LAYOUT)}


def forged(value: float) -> Callable[[Values, int], Values]:
    """An update that FedSigma would not send, with a valid checksum."""

    def change(values: Values, _: int) -> Values:
        data = bytearray(values["update"])
        data[-4:] = struct.pack("<f", value)
        data[48:52] = struct.pack("<I", zlib.crc32(bytes(data[52:]), zlib.crc32(bytes(data[:48]))))
        return {"update": bytes(data)}

    return change


def replay() -> Callable[[Values, int], Values]:
    """Send the first round's reply again and again."""
    kept: Values = {}

    def change(values: Values, _: int) -> Values:
        kept.update(kept or values)
        return kept

    return change


def away(folder: RunDir, clean: np.ndarray) -> float:
    """Distance of the attacked model from the clean one, as a share of its norm."""
    return float(np.linalg.norm(shift_of(folder) - clean) / np.linalg.norm(clean))


@pytest.fixture
def clean(tmp_path: Path) -> np.ndarray:
    """The model of the honest sites alone: the hostile one never replies."""
    folder = run(tmp_path, PLAIN, out="clean", tamper=attack(lambda *_: None))
    assert [event["site"] for event in events(folder, "site_timed_out")] == ["jiangxi"] * ROUNDS
    return shift_of(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forged(float("nan")), "not finite"),
        (forged(float("inf")), "not finite"),
        (lambda *_: {"update": b"\0" * 100_000_000}, "at most"),
        (lambda *_: {"update": b"\0" * 1000}, "not a coded shift"),
        (lambda *_: {"examples": 10**9}, "1000000000 training images are claimed"),
        (lambda *_: {"steps": 10**6}, "1000000 steps were trained"),
        (moved(lambda x: 100 * x), "times the round's median"),
        (moved(lambda x: 1e30 * (x + 1)), "times the round's median"),
    ],
)
def test_a_rejected_update_leaves_the_model_unchanged(
    change: Callable[[Values, int], Values], message: str, clean: np.ndarray, tmp_path: Path
) -> None:
    folder = run(tmp_path, PLAIN, tamper=attack(change))
    rejected = events(folder, "reply_rejected")
    assert [event["round"] for event in rejected] == list(range(1, ROUNDS + 1))
    assert {event["site"] for event in rejected} == {"jiangxi"}
    assert all(message in event["reason"] for event in rejected)
    np.testing.assert_array_equal(shift_of(folder), clean)


def noise(x: np.ndarray) -> np.ndarray:
    """Six times the update's norm, in a fixed direction."""
    values = np.random.default_rng(0).normal(size=x.size)
    return 6 * values * np.linalg.norm(x) / np.linalg.norm(values)


SUBTLE = {"sign flip": moved(lambda x: -4 * x), "random": moved(noise)}


@pytest.mark.parametrize("name", SUBTLE)
@pytest.mark.parametrize("strategy", ["fedmedian", "krum", "fedtrimmedavg"])
def test_a_robust_strategy_limits_an_attack_within_the_bounds(
    name: str, strategy: str, clean: np.ndarray, tmp_path: Path
) -> None:
    plain = away(run(tmp_path, PLAIN, out="mean", tamper=attack(SUBTLE[name])), clean)
    options = {"krum": "{num_malicious_nodes: 1}", "fedtrimmedavg": "{beta: 0.25}"}.get(strategy, "{}")
    study = PLAIN.replace("rounds:", f"strategy: {strategy}, options: {options}, rounds:")
    robust = away(run(tmp_path, study, tamper=attack(SUBTLE[name])), clean)
    assert plain > 1 and robust < 0.6 * plain


def test_a_replayed_update_is_accepted_until_its_norm_is_an_outlier(tmp_path: Path) -> None:
    """Nothing else distinguishes an old update from a new one; honest updates become shorter each round."""
    honest = shift_of(run(tmp_path, PLAIN, out="honest"))
    folder = run(tmp_path, PLAIN, tamper=attack(replay()))
    assert [event["round"] for event in events(folder, "reply_rejected")] == [ROUNDS]
    assert away(folder, honest) < 1


def test_without_a_norm_factor_a_long_update_is_accepted(clean: np.ndarray, tmp_path: Path) -> None:
    study = PLAIN.replace("rounds:", "norm_factor: null, rounds:")
    folder = run(tmp_path, study, tamper=attack(moved(lambda x: 100 * x)))
    assert not events(folder, "reply_rejected") and away(folder, clean) > 5


def test_of_two_sites_neither_is_an_outlier(tmp_path: Path) -> None:
    study = PLAIN.replace("{source: demo}", "{source: demo, options: {names: [bccd, jiangxi]}}")

    def change(node: int, task: Message, reply: Message) -> Message:
        values = reply.content.config_records["fedsigma"]
        if node == 101 and "update" in values:
            values["update"] = encode(100 * decode(values["update"], LAYOUT), LAYOUT)
        return reply

    folder = run(tmp_path, study, sites=2, tamper=change)
    assert not events(folder, "reply_rejected") and len(NAMES) == 4
