"""What is written of each round: rows of rounds.csv, events, and one line of the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.study import StudyConfig
from fedsigma.server.federation.aggregation import Aggregator
from fedsigma.server.federation.messenger import SiteReply
from fedsigma.server.federation.privacy_plan import site_level_epsilon
from fedsigma.server.federation.site_manager import BUDGET_SPENT, SiteManager
from fedsigma.server.federation.site_sampling import Cohort
from fedsigma.server.federation.validation import InvalidReply, ValidUpdate, aggregate_metrics
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["RoundLog", "log_plan", "round_line"]

log = logging.getLogger("flwr.fedsigma")

MAX_NAMES = 20
"""How many sites the log names."""


def log_plan(study: StudyConfig, aggregator: Aggregator, sites: Iterable[str]) -> None:
    """Log how the study averages, and with which sites."""
    names = list(sites)
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    log.info("aggregation: %s %s", study.federation.strategy, study.federation.options or "")
    if aggregator.needs_all_updates:
        log.info("%s needs all updates at once: memory grows with their number", aggregator.name)
    log.info("sites: %s%s", ", ".join(names[:MAX_NAMES]), more)


def round_line(
    number: int,
    *,
    accepted: int,
    asked: int,
    metrics: Mapping[str, float],
    seconds: float,
    bytes_up: int,
    ok: bool,
) -> str:
    """One line about a finished round; the accuracy is that of the shift which the round began with."""
    parts = [f"{accepted} of {asked} sites"]
    if "accuracy" in metrics:
        parts.append(f"accuracy {100 * metrics['accuracy']:.1f} %")
    parts += [f"{seconds:.1f} s", f"{bytes_up / 1000:,.0f} kB up"]
    return f"round {number}: {', '.join(parts)}{'' if ok else ', no model: too few updates'}"


class RoundLog:
    """Writes what came of one round.

    Args:
        run_dir: The run.
        study: The study.
        site_manager: Is told of sites whose privacy budget is exhausted.
        number: Number of the round, from 1.
    """

    def __init__(self, run_dir: RunDir, study: StudyConfig, site_manager: SiteManager, number: int) -> None:
        self.number = number
        self._run_dir, self._study, self._site_manager = run_dir, study, site_manager

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event of this round."""
        self._run_dir.log_event(kind, round=self.number, **fields)

    def row(
        self,
        site: str,
        metrics: Mapping[str, float],
        status: str,
        *,
        up: int = 0,
        down: int = 0,
        reason: str = "",
    ) -> None:
        """Write a row of rounds.csv. Units: up and down in bytes."""
        self._run_dir.log_round(self.number, site, dict(metrics), up, down, status, reason)

    def reply(
        self,
        site: str,
        reply: SiteReply,
        result: ValidUpdate | InvalidReply | None,
        statistics: Mapping[str, float] | None = None,
    ) -> None:
        """Record what came of one site.

        Args:
            site: Name of the site.
            reply: The reply, without its record.
            result: The valid update or why the reply is invalid; None if there was no reply.
            statistics: See `update_statistics`; absent where single updates are not seen.
        """
        metrics: dict[str, float] = {}
        if isinstance(result, ValidUpdate):
            status, reason, metrics = "accepted", "", result.metrics
            self.event("reply_accepted", site=site, metrics=metrics, **reply.traces)
        elif result is not None:
            status, reason = "rejected", str(result)
            self.event("reply_rejected", site=site, reason=reason, **reply.traces)
        elif reply.timed_out:
            status, reason = "late", f"no reply within {self._study.federation.round_timeout_s:g} s"
            self.event("site_timed_out", site=site)
        else:
            status, reason = "failed", reply.failure
            if reason == BUDGET_SPENT:
                self._site_manager.stop_training(reply.node, round=self.number)
            else:
                self.event("site_failed", site=site, reason=reason)
        metrics = metrics | dict(statistics or {})
        self.row(site, metrics, status, up=reply.bytes_up, down=reply.bytes_down, reason=reason)

    def all_sites(self, cohort: Cohort, accepted: Mapping[int, ValidUpdate]) -> dict[str, float]:
        """Record and return the metrics over all accepted sites; empty without any."""
        if not accepted:
            return {}
        replies = [update.reply for update in accepted.values()]
        metrics = aggregate_metrics(
            {cohort.sites[node]: update.reply.evaluation for node, update in accepted.items()}
        )
        examples = metrics["examples"] = sum(reply.examples for reply in replies)
        loss = sum(reply.loss * reply.examples for reply in replies) / examples
        if not math.isnan(loss):
            metrics["loss"] = loss
        if self._study.privacy.in_training:
            metrics["epsilon"] = max(reply.epsilon for reply in replies)
        return self.totals(metrics)

    def totals(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Record and return metrics over all sites, with the epsilon of a study that protects whole sites."""
        totals = dict(metrics)
        if self._study.privacy.of_sites:
            totals["epsilon"] = site_level_epsilon(self._study, self.number)
        self.row(ALL_SITES, totals, ALL_SITES)
        return totals
