"""The replies of one round, taken one by one: each is checked, its change put on disk, and let go.

So a round needs no more memory for more sites, but for a few numbers of each. What a mean needs of the
changes is then read back one at a time, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedsigma.common.config.study import StudyConfig
from fedsigma.server.federation.messenger import Answer, in_order
from fedsigma.server.federation.validation import Accepted, Rejected, accept_training, too_long
from fedsigma.server.federation.vectors import Vectors

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["Count", "Gathered", "gather"]


@dataclass(frozen=True, kw_only=True)
class Count:
    """What a round came to.

    messages: what the inner strategy is to average, empty if too few replies count. sites: those that count,
    by name. lost: the nodes of sites that were lost to their network or machine. images: what sites told.
    """

    messages: list[Message]
    sites: list[str]
    lost: frozenset[int]
    images: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What came of each site that was asked, in the order in which they were asked.

    answers: without their records. accepted, rejected: of the replies that there were.
    """

    answers: dict[int, Answer]
    accepted: dict[int, Accepted]
    rejected: dict[int, Rejected]


def gather(
    answers: Iterable[Answer],
    changes: Vectors[int],
    *,
    nodes: Iterable[int],
    study: StudyConfig,
    layout: Layout,
    start: NDArray[np.float32],
) -> Gathered:
    """Take the answers of a round as they come.

    Args:
        answers: one of each site that was asked.
        changes: where the changes of replies that are in order by themselves are put.
        nodes: the sites that were asked, in order.
        study, layout, start: see `accept_training`.
    """
    seen: dict[int, Answer] = {}
    accepted: dict[int, Accepted] = {}
    rejected: dict[int, Rejected] = {}
    for answer in answers:
        node = answer.node
        seen[node] = answer.emptied()
        if answer.content is not None:
            try:
                accepted[node], change = accept_training(
                    answer.content,
                    study=study,
                    layout=layout,
                    start=start,
                    codec=study.federation.codec,
                    steps=study.training.local_steps,
                )
                changes.put(node, change)
            except Rejected as error:
                # Its traceback would hold the reply.
                rejected[node] = Rejected(str(error))
        del answer  # the loop would hold it while the next one is waited for
    # Where whole sites are hidden a change is clipped instead: one site's length must not decide whether
    # another's change counts.
    factor = None if study.privacy.of_sites else study.federation.norm_factor
    for node, reason in too_long(accepted, factor).items():
        rejected[node] = Rejected(reason)
        del accepted[node]
    ordered = in_order(nodes, seen.values())
    return Gathered(
        answers=ordered,
        accepted={node: accepted[node] for node in ordered if node in accepted},
        rejected=rejected,
    )
