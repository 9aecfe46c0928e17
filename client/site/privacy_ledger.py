"""The site's privacy ledger: every private release of its images, and the budgets that limit them.

The ledger belongs to the site and not to one run, because a budget protects patients, who are the same in all
runs and studies. A release is entered before training starts, so that after a crash the ledger can only
overstate the amount spent.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.privacy.accounting import PrivacyEvent, epsilon
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.hash_chain import HashChainedLog, LogTampered

__all__ = ["LedgerDamaged", "LedgerEntry", "PrivacyBudgetSpent", "PrivacyLedger"]


# The server receives the name of the exception's type and nothing else.
class PrivacyBudgetSpent(FedSigmaError, ValueError):
    """The release would exceed a budget, so the site rejects the task."""


class LedgerDamaged(FedSigmaError, ValueError):
    """The ledger was changed or cut, so the amount spent is unknown and no release is allowed."""


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One line of the ledger.

    Attributes:
        study: Name of the study.
        run: Flower's id of the run.
        round: Number of the round.
        mode: Mode of the training task, such as `round` or `local`.
        level: What the noise hides: image, group or site.
        event: The release.
    """

    study: str
    run: str
    round: int
    mode: str
    level: str
    event: PrivacyEvent


class PrivacyLedger:
    """A site's privacy.jsonl, a hash-chained log.

    Args:
        path: The file; created with the first release.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = HashChainedLog(path)

    def entries(self) -> list[LedgerEntry]:
        """Return all releases so far.

        Raises:
            LedgerDamaged: A line is invalid, or was changed or removed.
        """
        try:
            return [_parse_entry(values) for values in self._log.lines()]
        except (ValueError, KeyError, TypeError) as error:
            problem = error.what if isinstance(error, LogTampered) else f"invalid entry: {error}"
            raise LedgerDamaged(
                f"{self.path} was changed or cut ({problem}): restore the file and its .head from a backup;"
                " without them the amount spent is unknown, and the site cannot train with privacy"
            ) from None

    def charge(
        self, entry: LedgerEntry, privacy: PrivacyConfig, *, budget: float | None, delta: float
    ) -> float:
        """Enter a release if the study's budget and the site's allow it.

        Args:
            entry: The release.
            privacy: Privacy settings of the study, with its budget.
            budget: Epsilon of the site for all studies together, at `delta`; None for no limit.
            delta: Delta at which the site's budget is counted.

        Returns:
            The epsilon of all releases for this study, this one included, at the study's delta.

        Raises:
            PrivacyBudgetSpent: A budget does not allow it; nothing is written.
            LedgerDamaged: A line is invalid, or was changed or removed.
        """
        with self._log.locked() as append:
            entries = [*self.entries(), entry]
            spent = epsilon([e.event for e in entries if e.study == entry.study], privacy.delta)
            if spent > privacy.epsilon:
                raise PrivacyBudgetSpent(
                    f"study '{entry.study}' would spend epsilon {spent:.2f}, its budget is"
                    f" {privacy.epsilon:g} at delta {privacy.delta:g}"
                )
            total = epsilon([e.event for e in entries], delta) if budget is not None else 0.0
            if budget is not None and total > budget:
                raise PrivacyBudgetSpent(
                    f"all studies together would spend epsilon {total:.2f}, site.yaml allows {budget:g}"
                    f" at delta {delta:g}"
                )
            values = asdict(entry)
            append({"time": round(time.time(), 3), **values.pop("event"), **values})
        return spent


def _parse_entry(values: dict[str, Any]) -> LedgerEntry:
    rate, noise, steps = values["rate"], values["noise_multiplier"], values["steps"]
    if not (isinstance(rate, float) and isinstance(noise, float) and isinstance(steps, int)):
        raise TypeError("expected numbers for rate, noise_multiplier and steps")
    if not (0 < rate <= 1 and noise > 0 and steps > 0):
        raise ValueError("rate, noise_multiplier or steps is out of range")
    return LedgerEntry(
        study=str(values["study"]),
        run=str(values["run"]),
        round=int(str(values["round"])),
        mode=str(values["mode"]),
        level=str(values["level"]),
        event=PrivacyEvent(rate=rate, noise_multiplier=noise, steps=steps),
    )
