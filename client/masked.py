"""A site's part of a masked sum: its keys of a run, what it has been asked, and its masked reply."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord, Context, RecordDict
from numpy.typing import NDArray

from fedsigma.common import masking
from fedsigma.common.masking import Member, Place
from fedsigma.common.protocol import LOSS_UNIT, MaskedReply, TrainTask

if TYPE_CHECKING:
    from fedsigma.client.site import Site

__all__ = ["SITE_COUNTS", "Masker", "TooManyCohorts", "counts_of"]

_KEY, _ROUND = "fedsigma.mask-key", "fedsigma.masked-round"
Vector = NDArray[np.float32]


class TooManyCohorts(ValueError):
    """The server asks for the same round, or an older one, with another cohort once too often."""


class Masker:
    """One site's masks in one run; what it must remember lies in the state that Flower keeps for it.

    Args:
        site: with its identity and the others'.
        context: of the site in this run.
    """

    def __init__(self, site: Site, context: Context) -> None:
        self._site, self._run = site, context.run_id
        self._state: RecordDict = context.state

    def member(self) -> Member:
        """This site's entry in a cohort: its key of this run, made at first use, signed by its identity."""
        key = self._private().public_key().public_bytes_raw()
        return masking.sign(self._site.identity(), run=self._run, name=self._site.name, key=key)

    def allow(self, task: TrainTask) -> None:
        """Refuse a cohort that cannot be trusted, and a round that was answered for too many cohorts.

        Raises:
            MaskingError: a key is not that of a site that this one knows.
            TooManyCohorts: see there.
        """
        key = self._private().public_key().public_bytes_raw()
        place = self._place(task)
        masking.check_members(place, self._site.peers(task.setup), me=self._site.name, key=key)
        asked = self._asked(task.round)
        if place.info not in asked:
            if len(asked) >= self._site.policy.max_cohorts or self._last_round() > task.round:
                raise TooManyCohorts(
                    f"round {task.round} was answered for {len(asked)} cohorts, the last round was"
                    f" {self._last_round()}; site.yaml allows {self._site.policy.max_cohorts} a round"
                )
            asked.append(place.info)
        record = {"round": task.round, "asked": asked, "change": b"", "counts": cast(list[int], [])}
        kept = self._state.config_records.get(_ROUND)
        if kept is not None and kept["round"] == task.round:
            record |= {"change": cast(bytes, kept["change"]), "counts": cast(list[int], kept["counts"])}
        self._state[_ROUND] = ConfigRecord(record)  # type: ignore[arg-type]

    def trained(self) -> tuple[Vector, list[int]] | None:
        """The change and counts of the round that was allowed last, if it was trained for another cohort."""
        kept = self._state.config_records[_ROUND]
        if not kept["change"]:
            return None
        change = np.frombuffer(cast(bytes, kept["change"]), "<f4").astype(np.float32)
        return change, [int(count) for count in cast(list[int], kept["counts"])]

    def keep(self, change: Vector, counts: list[int]) -> None:
        """Remember what training gave, so that the round need not be trained again for another cohort."""
        record = self._state.config_records[_ROUND]
        record["change"], record["counts"] = change.astype("<f4").tobytes(), counts

    def reply(self, task: TrainTask, change: Vector, counts: list[int], *, steps: int) -> MaskedReply:
        """The masked, weighted change with the counts behind it.

        Raises:
            MaskingError: a value or a count has no room in the sum.
        """
        sites, place = len(task.members), self._place(task)
        integers = masking.to_integers(change, weight=counts[0], scale=place.scale, bound=place.bound)
        if counts[0] > task.most_examples or max(counts) * sites >= 2**31:
            raise masking.MaskingError("a count has no room in the masked sum")
        whole = np.concatenate([integers, np.array(counts, dtype=np.uint32)])
        masked = masking.mask(whole, place, me=self._site.name, private=self._private())
        return MaskedReply(masked=masked.astype("<u4").tobytes(), steps=steps)

    def _place(self, task: TrainTask) -> Place:
        return Place(
            run=self._run,
            round=task.round,
            attempt=task.attempt,
            members=task.members,
            bound=task.bound,
            most_examples=task.most_examples,
        )

    def _private(self) -> X25519PrivateKey:
        kept = self._state.config_records.get(_KEY)
        if kept is None:
            made = X25519PrivateKey.generate()
            self._state[_KEY] = ConfigRecord({"private": made.private_bytes_raw()})
            return made
        return X25519PrivateKey.from_private_bytes(cast(bytes, kept["private"]))

    def _asked(self, round: int) -> list[bytes]:
        kept = self._state.config_records.get(_ROUND)
        return list(cast(list[bytes], kept["asked"])) if kept is not None and kept["round"] == round else []

    def _last_round(self) -> int:
        kept = self._state.config_records.get(_ROUND)
        return 0 if kept is None else cast(int, kept["round"])


def counts_of(*, examples: int, loss: float, test_examples: int, accuracy: float) -> list[int]:
    """What is summed beside the change, in the order of `MASKED_COUNTS`.

    No loss is told below zero, and one that is not a number, as of private training, counts as zero.
    """
    right = round(accuracy * test_examples) if test_examples else 0
    units = 0 if math.isnan(loss) else max(0, round(examples * loss * LOSS_UNIT))
    return [examples, units, test_examples, right]


SITE_COUNTS = [1, 0, 0, 0]
"""What a site counts for where the site itself is hidden: one, and nothing is told of its images."""
