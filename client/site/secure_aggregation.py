"""A site's side of secure aggregation: its keys of a run, the tasks it has answered, and its masked reply.

The state of a run is stored in a file of the site and not in the state that Flower passes to its apps: Flower
starts a process for each waiting message, all with the same state, and the last process to end overwrites it.
Two concurrent tasks must not both find that no task was answered yet.
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
"""Seconds that a run's file is kept after its last write; a run may have to wait for other sites."""
Vector = NDArray[np.float32]
_REPLY = "reply."
"""Prefix of the tensor names of masked replies in the file."""


class TooManyCohorts(FedSigmaError, ValueError):
    """The round, or a later one, was already answered for as many cohorts as the site allows."""


class MaskFileDamaged(FedSigmaError, ValueError):
    """The file of a run's masks is invalid, so the earlier replies are unknown and no other is allowed."""


@dataclass
class _RunState:
    """What a site stores of a run.

    Attributes:
        private: The site's private key of the run, 32 bytes.
        round: The last round.
        task_digest: Digest of the round's task without its cohort.
        replies: For each mask context of the round, the masked values; empty until the reply is sent.
        update: The trained update; None before training.
        counts: The counts of `make_counts`.
    """

    private: bytes
    round: int = 0
    task_digest: str = ""
    replies: dict[str, NDArray[np.uint32]] = field(default_factory=dict)
    update: Vector | None = None
    counts: list[int] = field(default_factory=list)


class SecureAggregationClient:
    """One site's keys and masks in one run, named by Flower's id."""

    def __init__(self, site: Site, study: str, *, run: int) -> None:
        self._site, self._run, self._study = site, run, safe_name(study)
        self.path = site.personal_path / "masks" / f"{self._study}-{run}.masks"
        self._state: _RunState
        self._context: MaskContext
        """Context of the last task that `check_task` accepted."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run's file against other processes of the site, and read it.

        Raises:
            MaskFileDamaged: The file is invalid.
            OSError: The file cannot be written.
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
        """Return this site's member entry: its public key of this run, signed with its identity."""
        site = self._site
        return secure_aggregation.sign(site.identity(), run=self._run, name=site.name, key=self._public_key())

    def check_task(self, task: TrainTask) -> None:
        """Reject an untrusted cohort, and a round that was answered for too many cohorts.

        Raises:
            MaskingError: A member's key is not that of a known site, or the round is retried with another
                task.
            TooManyCohorts: The round, or a later one, was answered for too many cohorts.
        """
        state, site = self._state, self._site
        self._context = MaskContext(
            run=self._run,
            round=task.round,
            attempt=task.attempt,
            members=task.members,
            bound=task.bound,
            most_examples=task.most_examples,
            task=bytes.fromhex(_digest(task)),
        )
        context_id = self._context.info.hex()
        secure_aggregation.check_members(
            self._context, site.peers(task.study), me=site.name, key=self._public_key()
        )
        task_digest = _digest(replace(task, members=(), cohort=1, attempt=0, bound=1.0, most_examples=1))
        if task.round == state.round and context_id in state.replies:
            return
        cohorts = len(state.replies) if task.round == state.round else 0
        if cohorts >= site.policy.max_cohorts or state.round > task.round:
            raise TooManyCohorts(
                f"round {task.round} was answered for {cohorts} cohorts, the last round is {state.round};"
                f" site.yaml allows {site.policy.max_cohorts} cohorts a round"
            )
        if task.round == state.round and task_digest != state.task_digest:
            raise secure_aggregation.MaskingError(f"round {task.round} is retried with another task")
        if task.round != state.round:
            self._state = state = _RunState(state.private, round=task.round, task_digest=task_digest)
        state.replies[context_id] = np.zeros(0, np.uint32)
        self._write()

    def find_reply(self, task: TrainTask) -> MaskedReply | None:
        """Return the earlier reply to this task, if any; a mask is never used for a second vector."""
        masked = self._state.replies[self._context.info.hex()]
        return MaskedReply(masked=masked.astype("<u4").tobytes(), steps=task.steps) if masked.size else None

    def find_update(self) -> tuple[Vector, list[int]] | None:
        """Return the update and counts of the current round, if it was trained for another cohort."""
        return None if self._state.update is None else (self._state.update, self._state.counts)

    def store_update(self, update: Vector, counts: list[int]) -> None:
        """Store the trained update and its counts for other cohorts of the same round."""
        self._state.update, self._state.counts = update.astype(np.float32), counts
        self._write()

    def make_reply(self, task: TrainTask, update: Vector, counts: list[int]) -> MaskedReply:
        """Mask the update, float32 of shape (values,), and its counts, and store the reply.

        The update is weighted by the first count.

        Raises:
            MaskingError: A value or a count is too large for the masked sum.
        """
        sites, context = len(task.members), self._context
        integers = secure_aggregation.to_integers(
            update, weight=counts[0], scale=context.scale, bound=context.bound
        )
        if counts[0] > task.most_examples or max(counts) * sites >= 2**31:
            raise secure_aggregation.MaskingError("a count is too large for the masked sum")
        values = np.concatenate([integers, np.array(counts, dtype=np.uint32)])
        private = X25519PrivateKey.from_private_bytes(self._state.private)
        masked = secure_aggregation.mask(values, context, me=self._site.name, private=private)
        self._state.replies[context.info.hex()] = masked
        self._write()
        return MaskedReply(masked=masked.astype("<u4").tobytes(), steps=task.steps)

    def _public_key(self) -> bytes:
        return X25519PrivateKey.from_private_bytes(self._state.private).public_key().public_bytes_raw()

    def _write(self) -> None:
        state = self._state
        arrays: dict[str, NDArray[Any]] = {"private": np.frombuffer(state.private, np.uint8)}
        arrays |= {f"{_REPLY}{info}": masked for info, masked in state.replies.items()}
        if state.update is not None:
            arrays["update"] = state.update
        metadata = {"round": str(state.round), "task": state.task_digest, "counts": json.dumps(state.counts)}
        write_secret(self.path, save(arrays, metadata=metadata))

    def _remove_old(self) -> None:
        """Remove the files of earlier runs of the study; they hold updates without noise or mask."""
        for file in self.path.parent.glob(f"{self._study}-*.*"):
            if time.time() - file.stat().st_mtime > RETENTION_S and file != self.path.with_suffix(".lock"):
                file.unlink(missing_ok=True)


def _read(path: Path) -> _RunState:
    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata(), set(file.keys())
            return _RunState(
                file.get_tensor("private").tobytes(),
                round=int(metadata["round"]),
                task_digest=metadata["task"],
                replies={
                    name[len(_REPLY) :]: file.get_tensor(name)
                    for name in sorted(names)
                    if name.startswith(_REPLY)
                },
                update=file.get_tensor("update") if "update" in names else None,
                counts=[int(count) for count in json.loads(metadata["counts"])],
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MaskFileDamaged(
            f"{path} is invalid ({error}): the site cannot take part in this run any more"
        ) from error


def _digest(task: TrainTask) -> str:
    """Return the SHA-256 of a task, in hex; all sites of a cohort receive the same task."""
    return str(digest(fields_of(to_record(task)))["sha256"])


def make_counts(*, examples: int, loss: float, test_examples: int, accuracy: float) -> list[int]:
    """Return the counts that are summed with the update, in the order of `MASKED_COUNTS`.

    A negative loss, or NaN as of private training, counts as zero.
    """
    correct = round(accuracy * test_examples) if test_examples else 0
    units = 0 if math.isnan(loss) else max(0, round(examples * loss * LOSS_UNIT))
    return [examples, units, test_examples, correct]


SITE_COUNTS = [1, 0, 0, 0]
"""The counts where privacy hides whole sites: a weight of one, and nothing of the site's images."""
