"""The rounds of a study, as a Flower strategy wrapped around one of Flower's own.

This strategy decides who is asked, what is asked, and which replies count; the strategy inside it only
averages. It is driven by Flower's own loop (`Strategy.start`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from logging import INFO
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore import log
from numpy.typing import NDArray

from fedsigma.common.codec import download_level, encode
from fedsigma.common.config import StudyConfig
from fedsigma.common.learner import seed_for
from fedsigma.common.masking import Member
from fedsigma.common.noise import noisy_mean
from fedsigma.common.protocol import MaskedReply, Setup, TrainTask
from fedsigma.server import checkpoint, masked
from fedsigma.server.averaging import ARRAY, EXAMPLES, LOSS, begin_round, proximal
from fedsigma.server.budget import spent_of_sites
from fedsigma.server.drift import drift
from fedsigma.server.exchange import Answer, Exchange, attribute
from fedsigma.server.replies import Accepted, Rejected, accept_training, check_norm, pool, too_long
from fedsigma.server.roster import BUDGET_SPENT, Roster
from fedsigma.server.store import POOLED, RunFolder

if TYPE_CHECKING:
    from fedsigma.common.sigma import Fingerprint, Split

__all__ = ["BudgetsSpent", "SigmaStrategy"]

Vector = NDArray[np.float32]
MOST_REPEATS = 2
"""How often a round is asked for again that sites were lost in, and that made no model."""


class BudgetsSpent(RuntimeError):
    """The study cannot go on: the privacy budgets of too many sites are spent."""

    def __init__(self, round: int) -> None:
        super().__init__(f"round {round} and those after it were left out: privacy budgets are spent")
        self.round = round


class SigmaStrategy(Strategy):
    """One message a site and round: evaluate the incoming shift, train it, send it back.

    Args:
        averaging: Flower's strategy that averages.
        study: the study; its rounds are those of the whole study, however often it was interrupted.
        exchange, roster, folder: to reach the sites, to know who is ready, to keep what happens.
        split, fingerprint: of the server's own backbone; what is averaged is the shared part.
        done: the rounds that an earlier, interrupted run has finished.
    """

    def __init__(
        self,
        averaging: FedAvg,
        *,
        study: StudyConfig,
        exchange: Exchange,
        roster: Roster,
        folder: RunFolder,
        split: Split,
        fingerprint: Fingerprint,
        done: int = 0,
    ) -> None:
        self.averaging, self.study, self.exchange = averaging, study, exchange
        self.roster, self.folder, self.split, self.fingerprint = roster, folder, split, fingerprint
        self.layout = split.shared
        self.done = done
        self.models = 0
        """How many rounds of this process have produced a model."""
        self._cohort: dict[int, str] = {}
        self._sent: dict[int, Message] = {}
        self._task: TrainTask
        self.model: Vector = np.zeros(split.shared.size, np.float32)
        """The shift that the sites start from in the round, which is the model until its end."""
        self._last: dict[str, Vector] = {}
        self._started = 0.0

    def summary(self) -> None:
        """Log the averaging; the inner strategy's own summary speaks of choosing sites, which it does not."""
        federation = self.study.federation
        log(INFO, "\t├── Averaging: %s %s", federation.strategy, federation.options or "")
        log(INFO, "\t└── Sites: %s", ", ".join(self.roster.names.values()))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Build this round's task for every site that is ready.

        Raises:
            TooFewSites: not enough sites are ready in time.
            BudgetsSpent: too many sites take no more part, for their privacy budgets are spent.
        """
        number = self.done + server_round
        shift = arrays[ARRAY].numpy().astype(np.float32)
        self.model = shift
        if self.roster.spent and len(self.roster.willing()) < self.study.federation.min_sites:
            raise BudgetsSpent(number)
        self._started = time.monotonic()
        self._ask(number, attempt=0)
        begin_round(self.averaging, number, shift, self._cohort)
        return list(self._sent.values())

    def _ask(self, number: int, *, attempt: int) -> None:
        """Build the messages to all sites that are ready. attempt: of masked cohorts of this round."""
        self._cohort = self.roster.wait()
        self.folder.event("round_start", round=number, sites=list(self._cohort.values()))
        self._task = self._make_task(number, self.model)
        if self.study.federation.masking:
            self._task = masked.task_for(self._task, self._members(), self.study, attempt=attempt)
        timeout = self.study.federation.round_timeout_s
        self._sent = {
            node: self.exchange.message(
                node, self._task, kind=MessageType.TRAIN, timeout=timeout, group=str(number)
            )
            for node in self._cohort
        }

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, have the accepted ones averaged, and keep the result.

        Raises:
            RuntimeError: the inner strategy's result is not a finite shift of this layout.
        """
        number = self.done + server_round
        answers = attribute(self._sent, replies)
        messages, sites = self._count(number, answers)
        for _ in range(MOST_REPEATS):
            if messages or not any(answer.gone for answer in answers.values()):
                break
            # The network, or the centre's own front, was down: the round is not the sites' to lose.
            self.folder.event("round_again", round=number, sites=sites)
            self._ask(number, attempt=self._task.attempt + 1)
            answers = self.exchange.send(self._sent, timeout=self.study.federation.round_timeout_s)
            messages, sites = self._count(number, answers)
        # One site's shift alone would go out to all others: a cohort below min_sites makes no model.
        arrays = self._average(number, messages) if messages else None
        self.folder.event(
            "round_end",
            round=number,
            sites=sites,
            seconds=round(time.monotonic() - self._started, 3),
            ok=bool(messages),
        )
        return arrays, None

    def _count(self, number: int, answers: dict[int, Answer]) -> tuple[list[Message], list[str]]:
        counted = self._counted_masked if self.study.federation.masking else self._counted
        return counted(number, answers)

    def _counted(self, number: int, answers: dict[int, Answer]) -> tuple[list[Message], list[str]]:
        """What the inner strategy is to average, empty if too few replies count; and the sites that count."""
        verdicts = {node: self._check(answer) for node, answer in answers.items()}
        accepted = {node: one for node, one in verdicts.items() if isinstance(one, Accepted)}
        for node, reason in too_long(accepted, self.study.federation.norm_factor).items():
            verdicts[node] = Rejected(reason)
            del accepted[node]
        drifts = self._drifts(accepted)
        for node, verdict in verdicts.items():
            self._record(number, self._cohort[node], answers[node], verdict, drifts.get(node))
        self._pooled_row(number, accepted)
        self._remember(accepted)
        messages = [
            self._plain(node, one.shift, weight=one.weight, loss=one.reply.loss)
            for node, one in accepted.items()
        ]
        enough = len(accepted) >= self.study.federation.min_sites
        if enough and self.study.privacy.of_sites:
            messages = [self._hidden_sites(accepted)]
        return messages if enough else [], [self._cohort[node] for node in accepted]

    def _drifts(self, accepted: dict[int, Accepted]) -> dict[int, dict[str, float]]:
        """How each accepted site drifts; of sites that are to be hidden nothing, for no noise is in it."""
        if self.study.privacy.of_sites:
            return {}
        return dict(zip(accepted, drift(list(accepted.values()), self.model), strict=True))

    def _remember(self, accepted: dict[int, Accepted]) -> None:
        """Keep the shifts that may be explained: those of sites that allow it, where sites are not hidden."""
        sites = {} if self.study.privacy.of_sites else {self._cohort[n]: one for n, one in accepted.items()}
        for site in self.roster.explained & sites.keys():
            self._last[site] = sites[site].shift.astype(np.float32)

    def explainable(self) -> dict[str, Vector]:
        """The last accepted shift of each site that lets it be explained, by name; none in a masked study."""
        return {site: self._last[site] for site in sorted(self.roster.explained & self._last.keys())}

    def _hidden_sites(self, accepted: dict[int, Accepted]) -> Message:
        """One reply in place of all: the noisy mean of their clipped changes, each site counting alike."""
        start = self.model.astype(np.float64)
        shift = start + noisy_mean([one.shift - start for one in accepted.values()], self.study.privacy)
        return self._plain(next(iter(accepted)), shift, weight=len(accepted), loss=0.0)

    def _counted_masked(self, number: int, answers: dict[int, Answer]) -> tuple[list[Message], list[str]]:
        """As `_counted`, of a round whose sum alone can be read: without a site, it is asked for again."""
        up, down = Counter[int](), Counter[int]()
        while True:
            read = {n: masked.read_masked(a, self.layout, steps=self._task.steps) for n, a in answers.items()}
            for node, answer in answers.items():
                up[node] += answer.bytes_up
                down[node] += answer.bytes_down
                if not isinstance(reply := read[node], MaskedReply):
                    self._record(number, self._cohort[node], answer, reply)
            replies = {node: one for node, one in read.items() if isinstance(one, MaskedReply)}
            sites = [self._cohort[node] for node in replies]
            if len(replies) == len(answers) or len(replies) < self.study.federation.min_sites:
                break
            self.folder.event("masked_again", round=number, sites=sites)
            attempt = self._task.attempt + 1
            self._task = masked.task_for(self._task, self._members(replies), self.study, attempt=attempt)
            answers = self.exchange.ask(
                dict.fromkeys(replies, self._task),
                kind=MessageType.TRAIN,
                timeout=self.study.federation.round_timeout_s,
                group=str(number),
            )
        if len(replies) < self.study.federation.min_sites:
            return [], []
        traces = {node: answers[node].traces for node in replies}
        return self._summed(number, replies, up, down, traces), sites

    def _summed(
        self,
        number: int,
        replies: dict[int, MaskedReply],
        up: Counter[int],
        down: Counter[int],
        traces: dict[int, dict[str, Any]],
    ) -> list[Message]:
        """The sum of a whole cohort as one reply of all, empty if it cannot be right; records either."""
        try:
            found = masked.sum_masked(list(replies.values()), self._task, self.layout)
            shift = self.model.astype(np.float64) + found.change
            check_norm(shift, self.study.federation.norm_bound)
        except Rejected as error:
            self.folder.event("masked_sum_rejected", round=number, reason=str(error))
            return []
        for node in replies:
            site = self._cohort[node]
            self.folder.event("reply_accepted", round=number, site=site, metrics={}, **traces[node])
            self.folder.round_row(number, site, {}, up[node], down[node], "accepted")
        metrics = found.metrics | self._spent_of_sites(number)
        self.folder.round_row(number, POOLED, metrics, 0, 0, "pooled")
        return [self._plain(next(iter(replies)), shift, weight=found.examples, loss=found.loss)]

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
            setup=Setup.of(self.study),
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
                seed=seed_for(self.study.seed, POOLED, "round", number, "codec"),
            ),
        )

    def _check(self, answer: Answer) -> Accepted | Rejected | None:
        """The reply if it is in order by itself, why it is not, or nothing if there is none."""
        if answer.content is None:
            return None
        try:
            return accept_training(
                answer.content,
                study=self.study,
                layout=self.layout,
                start=self.model,
                codec=self.study.federation.codec,
                steps=self.study.training.local_steps,
            )
        except Rejected as error:
            return error

    def _record(
        self,
        number: int,
        site: str,
        answer: Answer,
        verdict: Accepted | Rejected | None,
        drifted: dict[str, float] | None = None,
    ) -> None:
        """Keep what came of one site; drifted: where its change is seen, how it lies to the others'."""
        metrics: dict[str, float] = {}
        if isinstance(verdict, Accepted):
            status, reason, metrics = "accepted", "", verdict.metrics
            self.folder.event("reply_accepted", round=number, site=site, metrics=metrics, **answer.traces)
        elif verdict is not None:
            status, reason = "rejected", str(verdict)
            self.folder.event("reply_rejected", round=number, site=site, reason=reason, **answer.traces)
        elif answer.late:
            status, reason = "late", f"no reply within {self.study.federation.round_timeout_s:g} s"
            self.folder.event("site_late", round=number, site=site)
        else:
            status, reason = "failed", answer.failure
            if reason == BUDGET_SPENT:
                self.roster.retire(answer.node, round=number)
            else:
                self.folder.event("site_failed", round=number, site=site, reason=reason)
        metrics = metrics | (drifted or {})
        self.folder.round_row(number, site, metrics, answer.bytes_up, answer.bytes_down, status, reason)

    def _pooled_row(self, number: int, accepted: dict[int, Accepted]) -> None:
        if not accepted:
            return
        replies = [one.reply for one in accepted.values()]
        examples = sum(reply.examples for reply in replies)
        metrics = pool({self._cohort[node]: one.reply.evaluation for node, one in accepted.items()})
        metrics["examples"] = examples
        loss = sum(reply.loss * reply.examples for reply in replies) / examples
        metrics |= {} if math.isnan(loss) else {"loss": loss}
        if self.study.privacy.in_training:
            metrics["epsilon"] = max(reply.epsilon for reply in replies)
        metrics |= self._spent_of_sites(number)
        self.folder.round_row(number, POOLED, metrics, 0, 0, "pooled")

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

    def _plain(self, node: int, shift: NDArray[np.float64], *, weight: int, loss: float) -> Message:
        """Build the reply that Flower's strategies expect. float64, so that the mean is rounded once."""
        arrays = ArrayRecord({ARRAY: Array(shift)})
        metrics = MetricRecord({EXAMPLES: weight, LOSS: loss})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=self._sent[node])
