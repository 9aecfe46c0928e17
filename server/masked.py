"""A round of which the server learns the sum only: what is asked, and what is read of the replies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config import StudyConfig
from fedsigma.common.masking import Member, scale_for, sum_of
from fedsigma.common.protocol import (
    LOSS_UNIT,
    MASKED_COUNTS,
    MaskedReply,
    ProtocolError,
    TrainTask,
    from_content,
)
from fedsigma.server.exchange import Answer
from fedsigma.server.replies import Rejected

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["MaskedSum", "most_examples", "read_masked", "sum_masked", "task_for"]


@dataclass(frozen=True, kw_only=True)
class MaskedSum:
    """What the server learns of a round.

    Shapes: change (layout size,), the weighted mean. Sums over the cohort: examples, loss (the mean over the
    images; nan, for untold, where the study is private), test_examples and right answers.
    """

    change: NDArray[np.float64]
    examples: int
    loss: float
    test_examples: int
    right: int

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars by name, as of one site."""
        told = {"examples": float(self.examples), "test_examples": float(self.test_examples)}
        told |= {} if math.isnan(self.loss) else {"loss": self.loss}
        return told | ({"accuracy": self.right / self.test_examples} if self.test_examples else {})


def most_examples(study: StudyConfig) -> int:
    """The most images that a site counts for; one where it counts like every other site."""
    if study.privacy.of_sites:
        return 1
    return min(study.max_examples_per_site, study.federation.max_examples or study.max_examples_per_site)


def task_for(
    task: TrainTask, members: Mapping[int, Member], study: StudyConfig, *, attempt: int
) -> TrainTask:
    """The task of a round for one cohort of it."""
    return replace(
        task,
        cohort=len(members),
        members=tuple(sorted(members.values(), key=lambda one: one.name)),
        attempt=attempt,
        bound=study.federation.mask_bound,
        most_examples=most_examples(study),
    )


def read_masked(answer: Answer, layout: Layout, *, steps: int) -> MaskedReply | Rejected | None:
    """A masked reply that is in order by itself, why it is not, or nothing if there is none."""
    if answer.content is None:
        return None
    try:
        reply = from_content(MaskedReply, answer.content)
    except ProtocolError as error:
        return Rejected(str(error))
    wanted = 4 * (layout.size + len(MASKED_COUNTS))
    if len(reply.masked) != wanted:
        return Rejected(f"the masked reply has {len(reply.masked)} bytes, expected {wanted}")
    return (
        reply if reply.steps <= steps else Rejected(f"{reply.steps} steps were taken, {steps} were asked for")
    )


def sum_masked(replies: list[MaskedReply], task: TrainTask, layout: Layout) -> MaskedSum:
    """Put a whole cohort's replies together.

    Raises:
        Rejected: the counts cannot be sums of honest replies: a site has sent something else.
    """
    total = sum_of(np.frombuffer(reply.masked, "<u4") for reply in replies)
    values, counts = total[: layout.size], total[layout.size :]
    examples, loss, test_examples, right = (int(count) for count in counts)
    sites = len(task.members)
    if not sites <= examples <= sites * task.most_examples or not 0 <= right <= test_examples or loss < 0:
        raise Rejected(
            f"the masked sum counts {examples} images, {right} of {test_examples} right and a loss of {loss}:"
            " a site of the cohort has sent something else than its mask allows"
        )
    scale = scale_for(bound=task.bound, weights=sites * task.most_examples)
    return MaskedSum(
        change=values / scale / examples,
        examples=examples,
        loss=math.nan if task.privacy.level != "none" else loss / LOSS_UNIT / examples,
        test_examples=test_examples,
        right=right,
    )
