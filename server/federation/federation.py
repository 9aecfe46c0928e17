"""What the rounds of one study work with, and what is recorded of each round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.sigma import Fingerprint, ParameterPartition
from fedsigma.common.wire.records import TrainReply
from fedsigma.server.federation.aggregation import Aggregator
from fedsigma.server.federation.messenger import Messenger
from fedsigma.server.federation.privacy_plan import site_level_epsilon
from fedsigma.server.federation.site_manager import BUDGET_SPENT, NodeDirectory, SiteManager
from fedsigma.server.federation.updates import UpdateBuffer
from fedsigma.server.federation.validation import SiteUpdate, aggregate_metrics
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["Federation", "RoundOutcome"]

Vector = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """The result of one attempt at a round.

    Attributes:
        shift: The next global shift, shape (values,), float32; None if too few replies were accepted.
        sampled: Number of sites that were sent the task.
        accepted: Names of the sites whose updates were accepted.
        lost: Nodes whose connection or machine was lost.
        attempt: Number of the round's last masked cohort.
        examples: Training images of the accepted sites, by name.
        metrics: Metrics over all sites, of the shift that the round began with.
        bytes_up: Size of all replies, bytes.
    """

    shift: Vector | None = None
    sampled: int
    accepted: list[str]
    lost: frozenset[int]
    attempt: int = 0
    examples: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    bytes_up: int


class Federation:
    """One study with its sites, aggregation rule and run folder.

    Args:
        study: The study.
        run_dir: Where rounds, events and checkpoints are written.
        messenger: Sends tasks and receives replies.
        partition: Which values are shared; these alone are sent and averaged.
        fingerprint: Of the server's backbone and basis.
        nodes: Which site each node belongs to; None where nodes are not registered, as in a simulation.

    Attributes:
        layout: The layout of the shared values.
        aggregator: The study's aggregation rule.
        site_manager: The sites that are ready.
        examples: Training images by site, as far as sites reported them.
        last_shifts: The last shift of each site that allows its explanation, by site.
    """

    def __init__(
        self,
        study: StudyConfig,
        run_dir: RunDir,
        messenger: Messenger,
        partition: ParameterPartition,
        fingerprint: Fingerprint,
        nodes: NodeDirectory | None = None,
    ) -> None:
        self.study, self.run_dir, self.messenger = study, run_dir, messenger
        self.partition, self.layout, self.fingerprint = partition, partition.shared, fingerprint
        self.aggregator = Aggregator(study)
        self.site_manager = SiteManager(messenger, run_dir, study, fingerprint, nodes)
        self.examples: dict[str, int] = {}
        self.last_shifts = UpdateBuffer[str](self.layout.size, run_dir.path)

    def explainable_shifts(self) -> Iterator[tuple[str, Vector]]:
        """The last shift of each site that still allows its explanation, by name; none under masks."""
        allowed = self.site_manager.allow_explanation & self.last_shifts.keys()
        return ((site, self.last_shifts[site]) for site in sorted(allowed))

    def log_update(
        self, number: int, update: SiteUpdate, statistics: Mapping[str, float] | None = None
    ) -> None:
        """Record the part of one site in a round, as an event and a row of rounds.csv.

        Args:
            number: Number of the round, from 1.
            update: The site's part.
            statistics: See `update_statistics`; absent where single updates are not seen.
        """
        site, reply, log_event = update.site, update.reply, self.run_dir.log_event
        metrics, reason = dict[str, float](), ""
        if update.training is not None:
            status, metrics = "accepted", update.metrics()
            log_event("reply_accepted", round=number, site=site, metrics=metrics, **reply.traces)
        elif update.rejection:
            status, reason = "rejected", update.rejection
            log_event("reply_rejected", round=number, site=site, reason=reason, **reply.traces)
        elif reply.timed_out:
            status, reason = "late", f"no reply within {self.study.federation.round_timeout_s:g} s"
            log_event("site_timed_out", round=number, site=site)
        elif reply.failure == BUDGET_SPENT:
            status, reason = "failed", reply.failure
            self.site_manager.stop_training(reply.node, round=number)
        else:
            status, reason = "failed", reply.failure
            log_event("site_failed", round=number, site=site, reason=reason)
        metrics |= statistics or {}
        self.run_dir.log_round(number, site, metrics, reply.bytes_up, reply.bytes_down, status, reason)

    def log_training(self, number: int, replies: Sequence[TrainReply]) -> dict[str, float]:
        """Record the metrics over all sites of their training replies, and return them; empty without any."""
        if not replies:
            return {}
        metrics = aggregate_metrics(reply.evaluation for reply in replies)
        examples = metrics["examples"] = sum(reply.examples for reply in replies)
        loss = sum(reply.loss * reply.examples for reply in replies) / examples
        if not math.isnan(loss):
            metrics["loss"] = loss
        if self.study.privacy.in_training:
            metrics["epsilon"] = max(reply.epsilon for reply in replies)
        return self.log_all_sites(number, metrics)

    def log_all_sites(self, number: int, metrics: dict[str, float]) -> dict[str, float]:
        """Record metrics over all sites; returns them with the epsilon of a study that protects sites."""
        if self.study.privacy.of_sites:
            metrics = metrics | {"epsilon": site_level_epsilon(self.study, number)}
        self.run_dir.log_round(number, ALL_SITES, metrics, 0, 0, ALL_SITES)
        return metrics
