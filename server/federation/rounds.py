"""The rounds of a study, as a Flower strategy wrapped around one of Flower's own.

This strategy decides who is asked, what is asked, and which replies count; the strategy inside it only
averages. It is driven by Flower's own loop (`Strategy.start`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import closing
from dataclasses import replace
from logging import INFO
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore import log
from numpy.typing import NDArray

from fedsigma.common.config.federation import MEANS
from fedsigma.common.privacy.noise import noisy_mean
from fedsigma.common.privacy.secure_aggregation import Member
from fedsigma.common.training.trainer import derive_seed
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.wire.codec import download_level, encode
from fedsigma.common.wire.records import StudySpec, TrainTask
from fedsigma.server.federation import checkpoint, secure_aggregation
from fedsigma.server.federation.aggregation import (
    ARRAY,
    EXAMPLES,
    LOSS,
    begin_round,
    drift,
    proximal,
    set_step,
    weighted_mean_update,
)
from fedsigma.server.federation.messenger import SiteReply, match_replies
from fedsigma.server.federation.privacy_plan import spent_of_sites
from fedsigma.server.federation.site_manager import BUDGET_SPENT, SiteManager
from fedsigma.server.federation.site_sampling import known_images, sample_sites
from fedsigma.server.federation.updates import RoundOutcome, UpdateBuffer, collect_updates
from fedsigma.server.federation.validation import (
    InvalidReply,
    ValidUpdate,
    aggregate_metrics,
    check_norm,
    l2_norm,
)
from fedsigma.server.runs.run_dir import ALL_SITES

if TYPE_CHECKING:
    from fedsigma.common.sigma import ParameterPartition

__all__ = ["BudgetsSpent", "SigmaStrategy"]

Vector = NDArray[np.float32]
MOST_REPEATS = 2
"""How often a round is asked for again that sites were lost in, and that made no model."""

OUTVOTED = "too few others replied, and the round was asked for again"
"""Why a reply that was in order does not count, of a site that is not asked again."""

MOST_NAMES = 20
"""How many sites the log names."""


class BudgetsSpent(FedSigmaError, RuntimeError):
    """The study cannot go on: the privacy budgets of too many sites are spent."""

    def __init__(self, round: int) -> None:
        super().__init__(f"round {round} and those after it were left out: privacy budgets are spent")
        self.round = round


class SigmaStrategy(Strategy):
    """One message a site and round: evaluate the incoming shift, train it, send it back.

    Args:
        averaging: Flower's strategy that averages.
        roster: who is ready, in which study, how they are reached, and where it is kept what happens. The
            study's rounds are those of the whole study, however often it was interrupted.
        split: of the server's own backbone; what is averaged is the shared part.
        done: the rounds that an earlier, interrupted run has finished.
    """

    def __init__(
        self, averaging: FedAvg, roster: SiteManager, *, split: ParameterPartition, done: int = 0
    ) -> None:
        self.averaging, self.roster, self.split = averaging, roster, split
        self.study, self.exchange = roster.study, roster.exchange
        self.folder, self.fingerprint = roster.folder, roster.fingerprint
        self.layout = split.shared
        self.done = done
        self.models = 0
        """How many rounds of this process have produced a model."""
        self._images = known_images(self.folder.rounds(), self.study, done=done) if done else {}
        self._cohort: dict[int, str] = {}
        self._factors: dict[int, float] = {}
        self._sent: dict[int, Message] = {}
        self._task: TrainTask
        self.model: Vector = np.zeros(split.shared.size, np.float32)
        """The shift that the sites start from in the round, which is the model until its end."""
        self._last = UpdateBuffer[str](split.shared.size, self.folder.path)
        self._started = 0.0

    def summary(self) -> None:
        """Log the averaging; the inner strategy's own summary speaks of choosing sites, which it does not."""
        federation = self.study.federation
        log(INFO, "\t├── Averaging: %s %s", federation.strategy, federation.options or "")
        if federation.strategy not in MEANS:
            log(INFO, "\t├── It needs the shifts of all sites at once: memory grows with their number")
        names = list(self.roster.names.values())
        more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
        log(INFO, "\t└── Sites: %s%s", ", ".join(names[:MOST_NAMES]), more)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Build this round's task for every ready site, or the study's share of them.

        Raises:
            TooFewSites: not enough sites are ready in time.
            BudgetsSpent: too many sites take no more part, for their privacy budgets are spent.
        """
        number = self.done + server_round
        shift = arrays[ARRAY].numpy().astype(np.float32)
        self.model = shift
        if self.roster.spent and len(self.roster.trainable()) < self.study.federation.min_sites:
            raise BudgetsSpent(number)
        self._started = time.monotonic()
        self._ask(number, attempt=0)
        set_step(self.averaging, self.study, number)
        begin_round(self.averaging, number, shift, self._cohort)
        return list(self._sent.values())

    def _ask(self, number: int, *, attempt: int, without: Set[int] = frozenset()) -> None:
        """Build the messages to the round's sites.

        Args:
            number: of the round.
            attempt: of masked cohorts of this round.
            without: sites that are not asked, if enough others are ready.
        """
        ready = self.roster.wait_for_sites()
        others = {node: name for node, name in ready.items() if node not in without}
        ready = others if len(others) >= self.study.federation.min_sites else ready
        drawn = sample_sites(ready, self.study, round=number, images=self._images)
        self._cohort, self._factors = drawn.sites, drawn.factors
        self.folder.log_event("round_start", round=number, sites=list(self._cohort.values()))
        self._task = self._make_task(number, self.model)
        if self.study.federation.masking:
            self._task = secure_aggregation.task_for(self._task, self._members(), self.study, attempt=attempt)
        timeout = self.study.federation.round_timeout_s
        tasks = dict.fromkeys(self._cohort, self._task)
        self._sent = self.exchange.messages(tasks, kind=MessageType.TRAIN, timeout=timeout, group=str(number))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, have the accepted ones averaged, and keep the result.

        Raises:
            RuntimeError: the inner strategy's result is not a finite shift of this layout.
        """
        number = self.done + server_round
        count = self._count(number, match_replies(self._sent, replies))
        for _ in range(MOST_REPEATS):
            if count.messages or not count.lost:
                break
            # The network, or the server's own front, was down: the round is not the sites' to lose. If it is
            # some sites only, others are asked in their place: they may be hung for long.
            self.folder.log_event("round_retried", round=number, sites=count.sites)
            for site in count.sites:
                self.folder.log_round(number, site, {}, 0, 0, "failed", OUTVOTED)
            some = count.lost if len(count.lost) < len(self._cohort) else frozenset[int]()
            self._ask(number, attempt=self._task.attempt + 1, without=some)
            answers = self.exchange.send(self._sent, timeout=self.study.federation.round_timeout_s)
            count = self._count(number, answers)
        self._images |= count.images
        # One site's shift alone would go out to all others: a cohort below min_sites makes no model.
        arrays = self._average(number, count.messages) if count.messages else None
        self.folder.log_event(
            "round_end",
            round=number,
            sites=count.sites,
            seconds=round(time.monotonic() - self._started, 3),
            ok=bool(count.messages),
        )
        return arrays, None

    def _count(self, number: int, answers: Iterable[SiteReply]) -> RoundOutcome:
        counted = self._counted_masked if self.study.federation.masking else self._counted
        return counted(number, answers)

    def _counted(self, number: int, answers: Iterable[SiteReply]) -> RoundOutcome:
        with closing(UpdateBuffer[int](self.layout.size, self.folder.path)) as changes:
            found = collect_updates(
                answers,
                changes,
                nodes=self._cohort,
                study=self.study,
                layout=self.layout,
                start=self.model,
            )
            told = found.accepted
            accepted = {n: replace(one, weight=one.weight * self._factors[n]) for n, one in told.items()}
            mean = np.zeros(self.layout.size)
            drifts: dict[int, dict[str, float]] = {}
            # Of sites that are to be hidden nothing is told of how they drift, for no noise is in it.
            if accepted and not self.study.privacy.of_sites:
                mean = weighted_mean_update(accepted, changes)
                drifts = drift(accepted, changes, mean)
            for node, answer in found.answers.items():
                verdict = accepted.get(node, found.rejected.get(node))
                self._record(number, self._cohort[node], answer, verdict, drifts.get(node))
            self._pooled_row(number, accepted)
            self._remember(accepted, changes)
            enough = len(accepted) >= self.study.federation.min_sites
            return RoundOutcome(
                messages=self._to_average(accepted, changes, mean) if enough else [],
                sites=[self._cohort[node] for node in accepted],
                lost=frozenset(node for node, answer in found.answers.items() if answer.connection_lost),
                images={self._cohort[node]: int(one.weight) for node, one in told.items()},
            )

    def _to_average(
        self, accepted: dict[int, ValidUpdate], changes: UpdateBuffer[int], mean: NDArray[np.float64]
    ) -> list[Message]:
        """What the inner strategy is to average: one reply in place of all where that gives the same."""
        start, private = self.model.astype(np.float64), self.study.privacy
        first, weight = next(iter(accepted)), sum(one.weight for one in accepted.values())
        if private.of_sites:  # each site counts alike
            noisy = noisy_mean((changes[node] for node in accepted), private)
            return [self._plain(first, start + noisy, weight=len(accepted), loss=0.0)]
        if self.study.federation.strategy in MEANS:
            return [self._plain(first, start + mean, weight=weight, loss=0.0)]
        return [
            self._plain(node, start + changes[node], weight=one.weight, loss=one.reply.loss)
            for node, one in accepted.items()
        ]

    def _remember(self, accepted: dict[int, ValidUpdate], changes: UpdateBuffer[int]) -> None:
        """Keep the shifts that may be explained: those of sites that allow it, where sites are not hidden."""
        for node in () if self.study.privacy.of_sites else accepted:
            if (site := self._cohort[node]) in self.roster.explained:
                self._last.put(site, self.model.astype(np.float64) + changes[node])

    def explainable(self) -> Iterator[tuple[str, Vector]]:
        """The last accepted shift of each site that lets it be explained, by name; none in a masked study."""
        return ((site, self._last[site]) for site in sorted(self.roster.explained & self._last.keys()))

    def _counted_masked(self, number: int, answers: Iterable[SiteReply]) -> RoundOutcome:
        """As `_counted`, of a round whose sum alone can be read: without a site, it is asked for again."""
        up, down, lost = Counter[int](), Counter[int](), set[int]()
        while True:
            adding = secure_aggregation.MaskedSumBuilder(self.layout, steps=self._task.steps)
            for answer in answers:
                up[answer.node] += answer.bytes_up
                down[answer.node] += answer.bytes_down
                lost |= {answer.node} if answer.connection_lost else set()
                adding.take(answer)
                del answer  # the loop would hold it while the next one is waited for
            asked = [node for node in self._cohort if node in adding.answers]
            whole = [node for node in asked if node in adding.added]
            for node in asked:
                if node not in adding.added:
                    answer, verdict = adding.answers[node], adding.rejected.get(node)
                    self._record(number, self._cohort[node], answer, verdict)
            sites = [self._cohort[node] for node in whole]
            if len(whole) == len(asked) or len(whole) < self.study.federation.min_sites:
                break
            self.folder.log_event("masked_round_retried", round=number, sites=sites)
            attempt = self._task.attempt + 1
            self._task = secure_aggregation.task_for(
                self._task, self._members(whole), self.study, attempt=attempt
            )
            answers = self.exchange.send_tasks(
                dict.fromkeys(whole, self._task),
                kind=MessageType.TRAIN,
                timeout=self.study.federation.round_timeout_s,
                group=str(number),
            )
        if len(whole) < self.study.federation.min_sites:
            return RoundOutcome(messages=[], sites=[], lost=frozenset(lost))
        messages = self._summed(number, whole, adding, up, down)
        return RoundOutcome(messages=messages, sites=sites, lost=frozenset(lost))

    def _summed(
        self,
        number: int,
        nodes: list[int],
        adding: secure_aggregation.MaskedSumBuilder,
        up: Counter[int],
        down: Counter[int],
    ) -> list[Message]:
        """The sum of a whole cohort as one reply of all, empty if it cannot be right; records either."""
        try:
            found = adding.sum(self._task)
            shift = self.model.astype(np.float64) + found.change
            check_norm(l2_norm(shift), self.study.federation.norm_bound)
        except InvalidReply as error:
            self.folder.log_event("masked_sum_rejected", round=number, reason=str(error))
            return []
        for node in nodes:
            site, traces = self._cohort[node], adding.answers[node].traces
            self.folder.log_event("reply_accepted", round=number, site=site, metrics={}, **traces)
            self.folder.log_round(number, site, {}, up[node], down[node], "accepted")
        metrics = found.metrics | self._spent_of_sites(number)
        self.folder.log_round(number, ALL_SITES, metrics, 0, 0, "pooled")
        return [self._plain(nodes[0], shift, weight=found.examples, loss=found.loss)]

    def _members(self, nodes: Iterable[int] | None = None) -> dict[int, Member]:
        return {node: self.roster.members[node] for node in (self._cohort if nodes is None else nodes)}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nothing: evaluation rides on the rounds' own tasks."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: see `configure_evaluate`."""
        return None

    def _make_task(self, number: int, shift: Vector) -> TrainTask:
        steps, rounds = self.study.training.local_steps, self.study.federation.rounds
        return TrainTask(
            study=StudySpec.of(self.study),
            recipe=replace(self.study.training, proximal=proximal(self.averaging, self.study)),
            mode="round",
            round=number,
            cohort=len(self._cohort),
            first_step=(number - 1) * steps,
            steps=steps,
            total_steps=rounds * steps,
            codec=self.study.federation.codec,
            privacy=self.study.privacy,
            evaluate=(number - 1) % self.study.federation.evaluate_every == 0,
            run=self.folder.key,
            shift=encode(
                shift,
                self.layout,
                level=download_level(self.study.federation.codec),
                seed=derive_seed(self.study.seed, ALL_SITES, "round", number, "codec"),
            ),
        )

    def _record(
        self,
        number: int,
        site: str,
        answer: SiteReply,
        verdict: ValidUpdate | InvalidReply | None,
        drifted: dict[str, float] | None = None,
    ) -> None:
        """Keep what came of one site; drifted: where its change is seen, how it lies to the others'."""
        metrics: dict[str, float] = {}
        if isinstance(verdict, ValidUpdate):
            status, reason, metrics = "accepted", "", verdict.metrics
            self.folder.log_event("reply_accepted", round=number, site=site, metrics=metrics, **answer.traces)
        elif verdict is not None:
            status, reason = "rejected", str(verdict)
            self.folder.log_event("reply_rejected", round=number, site=site, reason=reason, **answer.traces)
        elif answer.timed_out:
            status, reason = "late", f"no reply within {self.study.federation.round_timeout_s:g} s"
            self.folder.log_event("site_timed_out", round=number, site=site)
        else:
            status, reason = "failed", answer.failure
            if reason == BUDGET_SPENT:
                self.roster.stop_training(answer.node, round=number)
            else:
                self.folder.log_event("site_failed", round=number, site=site, reason=reason)
        metrics = metrics | (drifted or {})
        self.folder.log_round(number, site, metrics, answer.bytes_up, answer.bytes_down, status, reason)

    def _pooled_row(self, number: int, accepted: dict[int, ValidUpdate]) -> None:
        if not accepted:
            return
        replies = [one.reply for one in accepted.values()]
        examples = sum(reply.examples for reply in replies)
        metrics = aggregate_metrics(
            {self._cohort[node]: one.reply.evaluation for node, one in accepted.items()}
        )
        metrics["examples"] = examples
        loss = sum(reply.loss * reply.examples for reply in replies) / examples
        metrics |= {} if math.isnan(loss) else {"loss": loss}
        if self.study.privacy.in_training:
            metrics["epsilon"] = max(reply.epsilon for reply in replies)
        metrics |= self._spent_of_sites(number)
        self.folder.log_round(number, ALL_SITES, metrics, 0, 0, "pooled")

    def _spent_of_sites(self, number: int) -> dict[str, float]:
        if not self.study.privacy.of_sites:
            return {}
        return {"epsilon": spent_of_sites(self.study, number)}

    def _average(self, number: int, messages: list[Message]) -> ArrayRecord:
        """Have the inner strategy average the accepted shifts, and save what comes out."""
        arrays, _ = self.averaging.aggregate_train(number, messages)
        shift: Vector = np.zeros(0, np.float32)
        if arrays is not None:
            shift = arrays[ARRAY].numpy().astype(np.float32)
        if shift.shape != (self.layout.size,) or not bool(np.isfinite(shift).all()):
            name = self.study.federation.strategy
            raise RuntimeError(f"{name} gave no finite shift in round {number}: check federation.options")
        checkpoint.keep(
            self.folder,
            self.averaging,
            shift,
            study=self.study,
            split=self.split,
            fingerprint=self.fingerprint,
            round=number,
        )
        self.models += 1
        return ArrayRecord({ARRAY: Array(shift)})

    def _plain(self, node: int, shift: NDArray[np.float64], *, weight: float, loss: float) -> Message:
        """Build the reply that Flower's strategies expect. float64, so that the mean is rounded once."""
        arrays = ArrayRecord({ARRAY: Array(shift)})
        metrics = MetricRecord({EXAMPLES: weight, LOSS: loss})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=self._sent[node])
