"""What a site's images have been given away so far: every private release, and the budgets it may not exceed.

The ledger is a file at the site, not a state of one run: budgets protect patients, and those are the same in
each run and study. A release is written down before training starts, so that a crash can only overstate it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.privacy.accounting import PrivacyEvent, epsilon
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.hash_chain import HashChainedLog, LogTampered

__all__ = ["LedgerDamaged", "LedgerEntry", "PrivacyBudgetSpent", "PrivacyLedger"]


# The server sees the names of these types and nothing else.
class PrivacyBudgetSpent(FedSigmaError, ValueError):
    """What is asked for would take more than a budget allows: the site takes no more part."""


class LedgerDamaged(FedSigmaError, ValueError):
    """The ledger was changed or cut: what has been spent is not known, so nothing more may be."""


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One line: for which study and run, what is hidden, and the release."""

    study: str
    run: str
    round: int
    mode: str
    level: str
    event: PrivacyEvent


class PrivacyLedger:
    """A site's privacy.jsonl, a chained log.

    Args:
        path: of the file; it is made at the first release.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = HashChainedLog(path)

    def entries(self) -> list[LedgerEntry]:
        """Everything released so far.

        Raises:
            LedgerDamaged: a line does not read or was changed or removed.
        """
        with _damage(self.path):
            return [_entry(values) for values in self._log.lines()]

    def charge(
        self, entry: LedgerEntry, privacy: PrivacyConfig, *, budget: float | None, delta: float
    ) -> float:
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
        with _damage(self.path), self._log.opened() as log:
            after = [*map(_entry, log.lines()), entry]
            spent = epsilon([e.event for e in after if e.study == entry.study], privacy.delta)
            if spent > privacy.epsilon:
                raise PrivacyBudgetSpent(
                    f"study '{entry.study}' would have spent epsilon {spent:.2f}, its budget is"
                    f" {privacy.epsilon:g} at delta {privacy.delta:g}"
                )
            total = epsilon([e.event for e in after], delta) if budget is not None else 0.0
            if budget is not None and total > budget:
                raise PrivacyBudgetSpent(
                    f"all studies together would have spent epsilon {total:.2f}, site.yaml allows {budget:g}"
                    f" at delta {delta:g}"
                )
            log.append(_values(entry))
        return spent


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say what damage to the ledger means."""
    try:
        yield
    except (LogTampered, _NoEntry) as error:
        what = error.what if isinstance(error, LogTampered) else f"a line is no release: {error}"
        raise LedgerDamaged(
            f"{path} was changed or cut ({what}): put the file and its .head back from a backup; without it"
            " nobody knows what has been spent, and the site cannot train privately"
        ) from None


class _NoEntry(ValueError):
    """A line of the ledger does not say what was released."""


def _values(entry: LedgerEntry) -> dict[str, object]:
    return {
        "time": round(time.time(), 3),
        "study": entry.study,
        "run": entry.run,
        "round": entry.round,
        "mode": entry.mode,
        "level": entry.level,
        "rate": entry.event.rate,
        "noise_multiplier": entry.event.noise_multiplier,
        "steps": entry.event.steps,
    }


def _entry(values: dict[str, object]) -> LedgerEntry:
    try:
        rate, noise, steps = values["rate"], values["noise_multiplier"], values["steps"]
        if not (isinstance(rate, float) and isinstance(noise, float) and isinstance(steps, int)):
            raise TypeError("rate, noise_multiplier and steps are no numbers")
        if not (0 < rate <= 1 and noise > 0 and steps > 0):
            raise ValueError("rate, noise_multiplier or steps cannot be")
        return LedgerEntry(
            study=str(values["study"]),
            run=str(values["run"]),
            round=int(str(values["round"])),
            mode=str(values["mode"]),
            level=str(values["level"]),
            event=PrivacyEvent(rate=rate, noise_multiplier=noise, steps=steps),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _NoEntry(error) from None
