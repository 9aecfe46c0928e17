"""Sends tasks to sites over Flower's Grid and matches replies to sites as they arrive."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsigma.common.ops.flower_compat import ObjectPushError
from fedsigma.common.wire.digest import digest
from fedsigma.common.wire.records import fields_of, to_record, wire_bytes

__all__ = ["BATCH", "Messenger", "SiteReply", "in_order", "match_replies"]

T = TypeVar("T")
log = logging.getLogger("flwr.fedsigma")

BATCH = 32
"""The most messages that are pushed, and the most replies that are pulled, at a time."""
PUSH_RETRIES_S = (1.0, 5.0, 15.0)
"""Seconds to wait before messages are pushed again whose content the SuperLink did not take."""
SHORTEST_POLL_S, LONGEST_POLL_S = 0.1, 3.0
"""Seconds between two polls for replies: short while replies arrive, longer while none do."""
GRACE_S = 60.0
"""A message that no node fetched expires this many seconds after the server stopped waiting for it."""

# Flower's error codes, in words for the events.
_FLOWER_ERRORS = {
    2: "the site's app failed",
    3: "the site could not be reached in time",
    5: "the site went away",
    8: "the site's process ended",
}
_LOST = (_FLOWER_ERRORS[3], _FLOWER_ERRORS[5], _FLOWER_ERRORS[8])
_TYPE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")


@dataclass(frozen=True, kw_only=True)
class SiteReply:
    """What came back from one site: a record, the reason why not, or nothing in time.

    Attributes:
        node: Flower's id of the site's node.
        bytes_down: Size of the task.
        content: The reply's record; None if there was none.
        failure: Why there is no record, in words; empty if there is one or the site timed out.
        timed_out: Whether no reply of any kind arrived in time.
        bytes_up: Size of the reply; 0 without one.
        traces: Size and SHA-256 of the reply, as in the site's audit log.
    """

    node: int
    bytes_down: int
    content: RecordDict | None = None
    failure: str = ""
    timed_out: bool = False
    bytes_up: int = 0
    traces: dict[str, Any] = field(default_factory=dict)

    @property
    def connection_lost(self) -> bool:
        """Whether the network, the machine or a process failed, rather than the site declining."""
        return self.timed_out or self.failure in _LOST

    def emptied(self) -> SiteReply:
        """The same without the record, which is most of it."""
        return replace(self, content=None)


class Messenger:
    """Sends tasks to the nodes that are online and yields their replies as they arrive.

    Args:
        grid: Flower's connection to the SuperLink.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def online(self) -> set[int]:
        """The ids of the nodes that are connected now."""
        return set(self._grid.get_node_ids())

    def send_tasks(
        self, tasks: Mapping[int, object], *, kind: str, timeout: float, group: str = ""
    ) -> Iterator[SiteReply]:
        """Send each node its task, at once; the iterator then yields one reply for each node.

        A reply that arrived in time counts however long the receiver takes with those before it.

        Args:
            tasks: The task of each node. Nodes with the same task share one record in memory.
            kind: Flower's message type.
            timeout: Seconds to wait for replies.
            group: Flower's group id of the messages.

        Raises:
            ObjectPushError: The SuperLink did not take the messages.
        """
        messages = build_messages(tasks, kind=kind, ttl=timeout + GRACE_S, group=group)
        pushed = self._push(list(messages.values()))
        return match_replies(messages, self._replies(pushed, time.monotonic() + timeout))

    def _push(self, messages: list[Message]) -> list[str]:
        """Push messages in batches; returns the ids of those that the SuperLink took."""
        ids: list[str] = []
        for start in range(0, len(messages), BATCH):
            ids += [
                message_id for message_id in self._push_batch(messages[start : start + BATCH]) if message_id
            ]
        return ids

    def _push_batch(self, messages: list[Message]) -> list[str]:
        """Push messages, again if the SuperLink restarted after it took them and before their content.

        A message that it has already is taken for the same, and what it lacks is sent.
        """
        for pause in PUSH_RETRIES_S:
            try:
                return list(self._grid.push_messages(messages))
            except ObjectPushError as error:
                log.warning("%s The messages are pushed again.", error)
                time.sleep(pause)
        return list(self._grid.push_messages(messages))

    def _pull(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that have arrived to these messages, pulled in batches as they are consumed."""
        ids = list(message_ids)
        for start in range(0, len(ids), BATCH):
            replies = list(self._grid.pull_messages(ids[start : start + BATCH]))
            replies.reverse()
            while replies:  # popped, so that the consumer alone keeps a reply in memory
                yield replies.pop()

    def _replies(self, pushed: list[str], deadline: float) -> Iterator[Message]:
        waiting, pause = dict.fromkeys(pushed), SHORTEST_POLL_S
        while waiting:
            started, before = time.monotonic(), len(waiting)
            expired = started >= deadline
            for reply in self._pull(waiting):
                waiting.pop(reply.metadata.reply_to_message_id, None)
                yield reply
                del reply
            if expired or not waiting:
                return
            pause = SHORTEST_POLL_S if len(waiting) < before else pause * 1.5
            # A poll for thousands takes a while: it uses half of the time at most, since others poll, too.
            pause = min(max(pause, time.monotonic() - started), LONGEST_POLL_S)
            time.sleep(max(min(pause, deadline - time.monotonic()), 0.0))


def build_messages(
    tasks: Mapping[int, object], *, kind: str, ttl: float, group: str = ""
) -> dict[int, Message]:
    """Build the message that carries each node's task.

    Args:
        tasks: The task of each node; equal objects share one record.
        kind: Flower's message type.
        ttl: Seconds until the message expires.
        group: Flower's group id.
    """
    records = {id(task): to_record(task) for task in _distinct(tasks.values())}
    return {
        node: Message(records[id(task)], dst_node_id=node, message_type=kind, ttl=ttl, group_id=group)
        for node, task in tasks.items()
    }


def match_replies(sent: Mapping[int, Message], replies: Iterable[Message]) -> Iterator[SiteReply]:
    """Yield each reply with its node, and at the end the nodes that sent none.

    An error message of Flower's own, about a node that went away, has the server as its sender; the message
    that it replies to names the node. A second reply of one node is ignored.
    """
    by_message = {message.metadata.message_id: node for node, message in sent.items()}
    records = {node: message.content for node, message in sent.items()}
    sizes = {id(record): wire_bytes(record) for record in _distinct(records.values())}
    waiting = {node: sizes[id(record)] for node, record in records.items()}
    for reply in replies:
        node = by_message.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        if node in waiting:
            yield _site_reply(node, waiting.pop(node), reply)
        del reply  # the loop variable would keep it in memory while the next one is awaited
    for node, size in waiting.items():
        yield SiteReply(node=node, bytes_down=size, timed_out=True)


def in_order(nodes: Iterable[int], replies: Iterable[SiteReply]) -> dict[int, SiteReply]:
    """The replies by node in the order of `nodes`, so that results do not depend on who replied first."""
    by_node = {reply.node: reply for reply in replies}
    return {node: by_node[node] for node in nodes}


def _distinct(items: Iterable[T]) -> Iterable[T]:
    """Each object once, by identity: tasks hold lists and are slow to compare."""
    return {id(item): item for item in items}.values()


def _site_reply(node: int, bytes_down: int, reply: Message) -> SiteReply:
    if reply.has_content():
        record = reply.content
        return SiteReply(
            node=node,
            bytes_down=bytes_down,
            content=record,
            bytes_up=wire_bytes(record),
            traces=_traces(record),
        )
    cause = _FLOWER_ERRORS.get(reply.error.code, "")
    # FedSigma's sites send the name of a type. Any other text was written by someone else: it is dropped.
    kind = reply.error.reason if _TYPE_NAME.fullmatch(reply.error.reason or "") else ""
    failure = f"{cause}: {kind}" if cause and kind else cause or kind
    return SiteReply(node=node, bytes_down=bytes_down, failure=failure or f"error {reply.error.code}")


def _traces(record: RecordDict) -> dict[str, Any]:
    try:
        return digest(fields_of(record))
    except (KeyError, TypeError):  # not one of FedSigma's records: it will be rejected
        return {"bytes": wire_bytes(record)}
