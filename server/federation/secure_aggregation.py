"""A round of which the server learns the sum alone: its tasks, and the sum of the masked replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.privacy.secure_aggregation import scale_for, unmask_sum
from fedsigma.common.wire.records import (
    LOSS_UNIT,
    MASKED_COUNTS,
    MaskedReply,
    ProtocolError,
    TrainTask,
    from_record,
)
from fedsigma.server.federation.federation import Federation, RoundOutcome
from fedsigma.server.federation.validation import InvalidReply, SiteUpdate, check_norm, l2_norm

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["run_masked_round"]


def run_masked_round(
    federation: Federation,
    shift: NDArray[np.float32],
    sites: Mapping[int, str],
    task: TrainTask,
    *,
    attempt: int,
) -> RoundOutcome:
    """Run a round of which the server learns the sum of a cohort alone.

    Without one of its sites the sum cannot be read: the round is repeated with the cohort of those that
    replied.

    Args:
        federation: The sites, the aggregation rule and the run folder.
        shift: The global shift, shape (values,).
        sites: Name of each sampled site by node.
        task: The round's task without masks.
        attempt: How many cohorts the round had before.
    """
    study, run_dir, layout = federation.study, federation.run_dir, federation.layout
    number, nodes = task.round, list(sites)
    max_examples = study.max_examples_per_site
    if study.federation.max_examples:
        max_examples = min(max_examples, study.federation.max_examples)
    bytes_up, bytes_down, lost = Counter[int](), Counter[int](), set[int]()
    while True:
        members = [federation.site_manager.members[node] for node in nodes]
        task = replace(
            task,
            cohort=len(nodes),
            members=tuple(sorted(members, key=lambda member: member.name)),
            attempt=attempt,
            bound=study.federation.mask_bound,
            most_examples=1 if study.privacy.of_sites else max_examples,  # 1: all sites weigh the same
        )
        total, updates = _add_replies(federation, {node: sites[node] for node in nodes}, task)
        for node, update in updates.items():
            bytes_up[node] += update.reply.bytes_up
            bytes_down[node] += update.reply.bytes_down
            if update.reply.connection_lost:
                lost.add(node)
            if not update.masked:
                federation.log_update(number, update)
        complete = [node for node, update in updates.items() if update.masked]
        accepted = [sites[node] for node in complete]
        if len(complete) == len(nodes) or len(complete) < study.federation.min_sites:
            break
        run_dir.log_event("masked_round_retried", round=number, sites=accepted)
        nodes, attempt = complete, attempt + 1
    outcome = RoundOutcome(
        sampled=len(sites), accepted=[], lost=frozenset(lost), attempt=attempt, bytes_up=bytes_up.total()
    )
    if len(complete) < study.federation.min_sites:
        return outcome
    outcome = replace(outcome, accepted=accepted)
    try:
        mean, metrics = _read_sum(total, task, layout)
        check_norm(l2_norm(shift.astype(np.float64) + mean), study.federation.norm_bound)
    except InvalidReply as error:
        run_dir.log_event("masked_sum_rejected", round=number, reason=str(error))
        return outcome
    for node in complete:
        traces = updates[node].reply.traces
        run_dir.log_event("reply_accepted", round=number, site=sites[node], metrics={}, **traces)
        run_dir.log_round(number, sites[node], {}, bytes_up[node], bytes_down[node], "accepted")
    metrics = federation.log_all_sites(number, metrics)
    return replace(outcome, shift=federation.aggregator.step(shift, mean, round=number), metrics=metrics)


def _add_replies(
    federation: Federation, sites: Mapping[int, str], task: TrainTask
) -> tuple[NDArray[np.uint32], dict[int, SiteUpdate]]:
    """Send a cohort its task, and add up the masked replies as they arrive, releasing each.

    Returns:
        The sum modulo 2^32, shape (values + len(MASKED_COUNTS),), and the sites' parts in the order of
        `sites`.
    """
    total = np.zeros(federation.layout.size + len(MASKED_COUNTS), np.uint32)
    updates: dict[int, SiteUpdate] = {}
    timeout = federation.study.federation.round_timeout_s
    for reply in federation.messenger.send_tasks(
        sites, task, kind="train", timeout=timeout, group=str(task.round)
    ):
        update = SiteUpdate(site=sites[reply.node], reply=replace(reply, content=None))
        updates[reply.node] = update
        if reply.content is not None:
            try:
                total += _read_masked(reply.content, federation.layout, steps=task.steps)
                update.masked = True
            except InvalidReply as error:  # not kept itself: its traceback would keep the reply in memory
                update.rejection = str(error)
        del reply  # the loop variable would keep it in memory while the next one is awaited
    return total, {node: updates[node] for node in sites}


def _read_masked(content: Any, layout: Layout, *, steps: int) -> NDArray[np.uint32]:
    """Read the integers of a masked reply, shape (values + len(MASKED_COUNTS),).

    Raises:
        InvalidReply: Its form, length or number of steps is invalid.
    """
    try:
        reply = from_record(MaskedReply, content)
    except ProtocolError as error:
        raise InvalidReply(str(error)) from error
    expected = 4 * (layout.size + len(MASKED_COUNTS))
    if len(reply.masked) != expected:
        raise InvalidReply(f"the masked reply has {len(reply.masked)} bytes, expected {expected}")
    if reply.steps > steps:
        raise InvalidReply(f"{reply.steps} steps were trained, the task asked for {steps}")
    return np.frombuffer(reply.masked, "<u4")


def _read_sum(
    masked: NDArray[np.uint32], task: TrainTask, layout: Layout
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Read the sum of a complete cohort.

    Returns:
        The weighted mean update, shape (values,), and the metrics over all sites by the columns of
        rounds.csv.

    Raises:
        InvalidReply: The counts cannot be sums of honest replies.
    """
    total = unmask_sum([masked])
    examples, loss, test_examples, correct = (int(count) for count in total[layout.size :])
    sites = len(task.members)
    if not sites <= examples <= sites * task.most_examples or not 0 <= correct <= test_examples or loss < 0:
        raise InvalidReply(
            f"the masked sum counts {examples} images, {correct} of {test_examples} correct and a loss of"
            f" {loss}: a site of the cohort sent other values than it agreed to"
        )
    metrics: dict[str, float] = {"examples": examples, "test_examples": test_examples}
    if task.privacy.level == "none":
        metrics["loss"] = loss / LOSS_UNIT / examples
    if test_examples:
        metrics["accuracy"] = correct / test_examples
    scale = scale_for(bound=task.bound, weights=sites * task.most_examples)
    return total[: layout.size] / scale / examples, metrics
