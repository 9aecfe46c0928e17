"""What a site's images have been given away so far: every private release, and the budgets it may not exceed.

The ledger is a file at the site, not a state of one run: budgets protect patients, and those are the same in
each run and study. A release is written down before training starts, so that a crash can only overstate it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedsigma.common.privacy import PrivacyConfig, Release, epsilon

__all__ = ["Entry", "Ledger", "LedgerDamaged", "PrivacyBudgetSpent"]


# The server sees the names of these types and nothing else.
class PrivacyBudgetSpent(ValueError):
    """What is asked for would take more than a budget allows: the site takes no more part."""


class LedgerDamaged(ValueError):
    """The ledger was changed or cut: what has been spent is not known, so nothing more may be."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line: for which study and run, what is hidden, and the release."""

    study: str
    run: str
    round: int
    mode: str
    level: str
    release: Release


class Ledger:
    """A site's privacy.jsonl; each line holds the digest of the one before it.

    Args:
        path: of the file; it is made at the first release.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """Everything released so far.

        Raises:
            LedgerDamaged: a line does not read, or does not follow from the one before it.
        """
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            return self._read(file)[0]

    def spend(self, entry: Entry, privacy: PrivacyConfig, *, budget: float | None, delta: float) -> float:
        """Write down a release if the budgets allow it.

        Args:
            entry: what is about to be released.
            privacy: the study's; its budget counts the releases for this study.
            budget: the site's own for all studies together, an epsilon; None for none.
            delta: at which the site's own budget is counted.

        Returns:
            The epsilon of all releases for this study, this one among them, at the study's delta.

        Raises:
            PrivacyBudgetSpent: a budget does not allow it; nothing is written.
            LedgerDamaged: see `entries`.
        """
        with self._locked() as file:
            known, last, whole = self._read(file)
            after = [*known, entry]
            spent = epsilon([e.release for e in after if e.study == entry.study], privacy.delta)
            if spent > privacy.epsilon:
                raise PrivacyBudgetSpent(
                    f"study '{entry.study}' would have spent epsilon {spent:.2f}, its budget is"
                    f" {privacy.epsilon:g} at delta {privacy.delta:g}"
                )
            total = epsilon([e.release for e in after], delta) if budget is not None else 0.0
            if budget is not None and total > budget:
                raise PrivacyBudgetSpent(
                    f"all studies together would have spent epsilon {total:.2f}, site.yaml allows {budget:g}"
                    f" at delta {delta:g}"
                )
            file.truncate(whole)
            file.write(_line(entry, last))
            file.flush()
            os.fsync(file.fileno())
        return spent

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, which no other process can write meanwhile: two studies may run at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _read(self, file: IO[bytes]) -> tuple[list[Entry], str, int]:
        """The entries, the digest of the last line, and the length of the whole lines.

        A last line without its end was being written when the power went: training had not started.
        """
        file.seek(0)
        content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        found, previous = [], ""
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                values = json.loads(line)
                if values["previous"] != previous:
                    raise ValueError
                found.append(_entry(values))
            except (ValueError, KeyError, TypeError):
                raise LedgerDamaged(
                    f"line {number} of {self.path} was changed or cut: put the file back from a backup;"
                    " without it nobody knows what has been spent, and the site cannot train privately"
                ) from None
            previous = hashlib.sha256(line).hexdigest()
        return found, previous, len(content)


def _line(entry: Entry, previous: str) -> bytes:
    values = {
        "time": round(time.time(), 3),
        "study": entry.study,
        "run": entry.run,
        "round": entry.round,
        "mode": entry.mode,
        "level": entry.level,
        "rate": entry.release.rate,
        "noise_multiplier": entry.release.noise_multiplier,
        "steps": entry.release.steps,
        "previous": previous,
    }
    return json.dumps(values, sort_keys=True).encode() + b"\n"


def _entry(values: dict[str, object]) -> Entry:
    rate, noise, steps = values["rate"], values["noise_multiplier"], values["steps"]
    if not (isinstance(rate, float) and isinstance(noise, float) and isinstance(steps, int)):
        raise TypeError
    if not (0 < rate <= 1 and noise > 0 and steps > 0):
        raise ValueError
    return Entry(
        study=str(values["study"]),
        run=str(values["run"]),
        round=int(str(values["round"])),
        mode=str(values["mode"]),
        level=str(values["level"]),
        release=Release(rate=rate, noise_multiplier=noise, steps=steps),
    )
