"""A site's part of a masked sum: its keys of a run, what it has been asked, and its masked reply.

What must be remembered lies in a file of the site's and not in the state that Flower hands to its apps:
Flower starts a process for each message that waits, all with the state as it was, and the last to end decides
what stays of it. Two tasks that come at once must not both find that nothing was answered yet.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsigma.client.site.personal_state import safe_name
from fedsigma.common.privacy import secure_aggregation
from fedsigma.common.privacy.secure_aggregation import MaskContext, Member
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_secret
from fedsigma.common.wire.digest import digest
from fedsigma.common.wire.records import LOSS_UNIT, MaskedReply, TrainTask, fields_of, to_record

if TYPE_CHECKING:
    from fedsigma.client.site.site import Site

__all__ = ["SITE_COUNTS", "MaskFileDamaged", "SecureAggregationClient", "TooManyCohorts", "make_counts"]

RETENTION_S = 60 * 24 * 3600
"""How long a run's file is kept after it was written last: a run may have to wait for other sites."""
Vector = NDArray[np.float32]


class TooManyCohorts(FedSigmaError, ValueError):
    """The server asks for the same round, or an older one, with another cohort once too often."""


class MaskFileDamaged(FedSigmaError, ValueError):
    """The file of a run's masks does not read: what was answered is not known, so nothing more may be."""


@dataclass
class _RunState:
    """What a site remembers of a run.

    private: its key. round: the one that was asked for last; work: a digest of what was to be trained in it;
    answered: for each place in it, the words that went out, none while they have not; change and counts: what
    training gave, None before.
    """

    private: bytes
    round: int = 0
    task_digest: str = ""
    replies: dict[str, NDArray[np.uint32]] = field(default_factory=dict)
    update: Vector | None = None
    counts: list[int] = field(default_factory=list)


class SecureAggregationClient:
    """One site's masks in one run. While it is held no other process of the site answers for the run.

    Args:
        site: with its identity and the others'.
        study: its name.
        run: Flower's id of it.
    """

    def __init__(self, site: Site, study: str, *, run: int) -> None:
        self._site, self._run, self._study = site, run, safe_name(study)
        self.path = site.personal_path / "masks" / f"{self._study}-{run}.masks"
        self._state: _RunState
        self._context: MaskContext
        """Of the task that was allowed last."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of the site out, and know what was answered before.

        Raises:
            MaskFileDamaged: see there.
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                self._state = _read(self.path)
            else:
                self._remove_old()
                self._state = _RunState(X25519PrivateKey.generate().private_bytes_raw())
                self._write()
            yield

    def member(self) -> Member:
        """This site's entry in a cohort: its key of this run, made at first use, signed by its identity."""
        return secure_aggregation.sign(
            self._site.identity(), run=self._run, name=self._site.name, key=self._public_key()
        )

    def check_task(self, task: TrainTask) -> None:
        """Refuse a cohort that cannot be trusted, and a round that was answered for too many cohorts.

        Raises:
            MaskingError: a key is not that of a site that this one knows, or the round is asked for again
                with other work to do.
            TooManyCohorts: see there.
        """
        kept, place = self._state, self._make_context(task)
        self._context = place
        secure_aggregation.check_members(
            place, self._site.peers(task.study), me=self._site.name, key=self._public_key()
        )
        work = _digest(replace(task, members=(), cohort=1, attempt=0, bound=1.0, most_examples=1)).hex()
        if task.round == kept.round and place.info.hex() in kept.replies:
            return
        asked = len(kept.replies) if task.round == kept.round else 0
        if asked >= self._site.policy.max_cohorts or kept.round > task.round:
            raise TooManyCohorts(
                f"round {task.round} was answered for {asked} cohorts, the last round was {kept.round};"
                f" site.yaml allows {self._site.policy.max_cohorts} a round"
            )
        if task.round == kept.round and work != kept.task_digest:
            raise secure_aggregation.MaskingError(
                f"round {task.round} is asked for again with other work to do"
            )
        if task.round != kept.round:
            self._state = kept = _RunState(kept.private, round=task.round, task_digest=work)
        kept.replies[place.info.hex()] = np.zeros(0, np.uint32)
        self._write()

    def find_reply(self, task: TrainTask) -> MaskedReply | None:
        """The reply to just this task, if there was one: one mask is for one vector, so none is made anew."""
        words = self._state.replies[self._context.info.hex()]
        return MaskedReply(masked=words.astype("<u4").tobytes(), steps=task.steps) if words.size else None

    def find_update(self) -> tuple[Vector, list[int]] | None:
        """The change and counts of the round that was allowed last, if it was trained for another cohort."""
        return None if self._state.update is None else (self._state.update, self._state.counts)

    def store_update(self, update: Vector, counts: list[int]) -> None:
        """Remember what training gave, so that the round need not be trained again for another cohort."""
        self._state.update, self._state.counts = update.astype(np.float32), counts
        self._write()

    def make_reply(self, task: TrainTask, update: Vector, counts: list[int]) -> MaskedReply:
        """The masked, weighted change with the counts behind it; it is on the disk before it is returned.

        Raises:
            MaskingError: a value or a count has no room in the sum.
        """
        sites, place = len(task.members), self._context
        integers = secure_aggregation.to_integers(
            update, weight=counts[0], scale=place.scale, bound=place.bound
        )
        if counts[0] > task.most_examples or max(counts) * sites >= 2**31:
            raise secure_aggregation.MaskingError("a count has no room in the masked sum")
        whole = np.concatenate([integers, np.array(counts, dtype=np.uint32)])
        private = X25519PrivateKey.from_private_bytes(self._state.private)
        words = secure_aggregation.mask(whole, place, me=self._site.name, private=private)
        self._state.replies[place.info.hex()] = words
        self._write()
        return MaskedReply(masked=words.astype("<u4").tobytes(), steps=task.steps)

    def _make_context(self, task: TrainTask) -> MaskContext:
        return MaskContext(
            run=self._run,
            round=task.round,
            attempt=task.attempt,
            members=task.members,
            bound=task.bound,
            most_examples=task.most_examples,
            task=_digest(task),
        )

    def _public_key(self) -> bytes:
        return X25519PrivateKey.from_private_bytes(self._state.private).public_key().public_bytes_raw()

    def _write(self) -> None:
        kept = self._state
        arrays: dict[str, NDArray[Any]] = {"private": np.frombuffer(kept.private, np.uint8)}
        arrays |= {f"answered.{info}": words for info, words in kept.replies.items()}
        if kept.update is not None:
            arrays["update"] = kept.update
        told = {"round": str(kept.round), "work": kept.task_digest, "counts": json.dumps(kept.counts)}
        write_secret(self.path, save(arrays, metadata=told))

    def _remove_old(self) -> None:
        """Remove what earlier runs of the study left: a change without noise or mask is in it."""
        for file in self.path.parent.glob(f"{self._study}-*.*"):
            if time.time() - file.stat().st_mtime > RETENTION_S and file != self.path.with_suffix(".lock"):
                file.unlink(missing_ok=True)


def _read(path: Path) -> _RunState:
    try:
        with safe_open(path, framework="np") as file:
            told, names = file.metadata(), set(file.keys())
            prefix = "answered."
            return _RunState(
                file.get_tensor("private").tobytes(),
                round=int(told["round"]),
                task_digest=told["work"],
                replies={
                    name.removeprefix(prefix): file.get_tensor(name)
                    for name in sorted(names)
                    if name.startswith(prefix)
                },
                update=file.get_tensor("update") if "update" in names else None,
                counts=[int(count) for count in json.loads(told["counts"])],
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MaskFileDamaged(
            f"{path} does not read ({error}): the site takes no more part in this run"
        ) from error


def _digest(task: TrainTask) -> bytes:
    """SHA-256 of all that a task says (32 bytes); the sites of a cohort get the same task."""
    return bytes.fromhex(digest(fields_of(to_record(task)))["sha256"])


def make_counts(*, examples: int, loss: float, test_examples: int, accuracy: float) -> list[int]:
    """What is summed beside the change, in the order of `MASKED_COUNTS`.

    No loss is told below zero, and one that is not a number, as of private training, counts as zero.
    """
    right = round(accuracy * test_examples) if test_examples else 0
    units = 0 if math.isnan(loss) else max(0, round(examples * loss * LOSS_UNIT))
    return [examples, units, test_examples, right]


SITE_COUNTS = [1, 0, 0, 0]
"""What a site counts for where the site itself is hidden: one, and nothing is told of its images."""
