"""A site's ledger of what has been spent."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from fedsigma.client.site import privacy_ledger as module
from fedsigma.client.site.privacy_ledger import LedgerDamaged, LedgerEntry, PrivacyBudgetSpent, PrivacyLedger
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.privacy.accounting import PrivacyEvent, epsilon

PRIVACY = PrivacyConfig(level="image", noise_multiplier=2.0, epsilon=4.0)
ONE = PrivacyEvent(rate=0.25, noise_multiplier=2.0, steps=2)


def entry(round: int = 1, study: str = "cells") -> LedgerEntry:
    return LedgerEntry(study=study, run="7", round=round, mode="round", level="image", event=ONE)


def spend(ledger: PrivacyLedger, round: int = 1, study: str = "cells", budget: float | None = None) -> float:
    return ledger.charge(entry(round, study), PRIVACY, budget=budget, delta=1e-5)


def test_spent_budget_is_visible_to_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "privacy.jsonl"
    first = spend(PrivacyLedger(path))
    second = spend(PrivacyLedger(path), 2)
    assert first == epsilon([ONE], 1e-5) and second == epsilon([ONE, ONE], 1e-5)
    assert PrivacyLedger(path).entries() == [entry(1), entry(2)]


def test_exhausted_budget_refuses_and_writes_nothing(tmp_path: Path) -> None:
    ledger, rounds = PrivacyLedger(tmp_path / "privacy.jsonl"), 0
    with pytest.raises(PrivacyBudgetSpent, match="study 'cells' would spend epsilon 4"):
        for rounds in range(1000):
            assert spend(ledger, rounds) <= 4.0
    before = ledger.path.read_bytes()
    assert len(ledger.entries()) == rounds > 3
    with pytest.raises(PrivacyBudgetSpent):
        spend(ledger, rounds)
    assert ledger.path.read_bytes() == before
    # Another study has a budget of its own ...
    assert spend(ledger, 1, "skin") == epsilon([ONE], 1e-5)
    # ... but the site's counts all.
    with pytest.raises(PrivacyBudgetSpent, match=r"all studies together .* site.yaml allows 4"):
        spend(ledger, 2, "skin", budget=4.0)


@pytest.mark.parametrize("damage", ["steps", "removed", "text", "negative"])
def test_a_changed_ledger_stops_private_training(damage: str, tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "privacy.jsonl")
    for round in range(3):
        spend(ledger, round)
    lines = ledger.path.read_text().splitlines(keepends=True)
    if damage == "steps":
        lines[1] = json.dumps({**json.loads(lines[1]), "steps": 1}) + "\n"
    elif damage == "removed":
        del lines[1]
    elif damage == "negative":
        # By someone who knows of the head, too: the last line then follows from all others.
        ledger.path.with_name("privacy.jsonl.head").unlink()
        lines[2] = json.dumps({**json.loads(lines[2]), "steps": -2}) + "\n"
    else:
        lines[0] = "what?\n"
    ledger.path.write_text("".join(lines))
    message = r"was changed or cut \((line [123] was|invalid entry).*restore the file and"
    with pytest.raises(LedgerDamaged, match=message):
        spend(ledger, 4)


def test_torn_last_line_is_ignored(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "privacy.jsonl")
    spend(ledger, 1)
    head = ledger.path.with_name("privacy.jsonl.head")
    before = head.read_bytes()
    spend(ledger, 2)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-20])
    head.write_bytes(before)
    assert ledger.entries() == [entry(1)]
    assert spend(ledger, 3) == epsilon([ONE, ONE], 1e-5)
    assert ledger.entries() == [entry(1), entry(3)]


def test_two_studies_at_once_cannot_both_take_the_last_of_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, refused = tmp_path / "privacy.jsonl", []
    monkeypatch.setattr(module, "epsilon", lambda *place: time.sleep(0.01) or epsilon(*place))
    last = next(n for n in range(1, 99) if epsilon([ONE] * (n + 1), 1e-5) > 4.0)

    def work(name: str) -> None:
        for round in range(last):
            try:
                spend(PrivacyLedger(path), round)
            except PrivacyBudgetSpent:
                refused.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(PrivacyLedger(path).entries()) == last and len(refused) == last
