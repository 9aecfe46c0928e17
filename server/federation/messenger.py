"""Sends tasks to sites over Flower's Grid and matches replies to sites as they arrive."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsigma.common.ops.flower_compat import ObjectPushError
from fedsigma.common.wire.digest import digest
from fedsigma.common.wire.records import fields_of, to_record, wire_bytes

__all__ = ["BATCH", "Messenger", "SiteReply", "build_messages", "match_replies"]

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
    """The reply of one site: a record, the reason why there is none, or nothing in time.

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


class Messenger:
    """Sends a task to nodes and yields their replies as they arrive.

    Args:
        grid: Flower's connection to the SuperLink.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def online(self) -> set[int]:
        """The ids of the nodes that are connected now."""
        return set(self._grid.get_node_ids())

    def send_tasks(
        self, nodes: Iterable[int], task: object, *, kind: str, timeout: float, group: str = ""
    ) -> Iterator[SiteReply]:
        """Send a task to each node, at once; the iterator then yields one reply for each node.

        A reply that arrived in time counts however long the receiver takes with those before it.

        Args:
            nodes: The nodes.
            task: A message of `fedsigma.common.wire`.
            kind: Flower's message type.
            timeout: Seconds to wait for replies.
            group: Flower's group id of the messages.

        Raises:
            ObjectPushError: The SuperLink did not take the messages.
        """
        messages = build_messages(nodes, task, kind=kind, ttl=timeout + GRACE_S, group=group)
        batches = list(messages.values())
        pushed = [
            message_id
            for start in range(0, len(batches), BATCH)
            for message_id in self._push(batches[start : start + BATCH])
            if message_id
        ]
        return match_replies(messages, self._replies(pushed, time.monotonic() + timeout))

    def _push(self, messages: list[Message]) -> Iterable[str]:
        """Push messages, again if the SuperLink restarted after it took them and before their content.

        The SuperLink recognises a message that it has already, and takes the content that it lacks.
        """
        for pause in PUSH_RETRIES_S:
            try:
                return self._grid.push_messages(messages)
            except ObjectPushError as error:
                log.warning("%s The messages are pushed again.", error)
                time.sleep(pause)
        return self._grid.push_messages(messages)

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
            for reply in self._pull(waiting):
                waiting.pop(reply.metadata.reply_to_message_id, None)
                yield reply
                del reply
            if started >= deadline or not waiting:
                return
            pause = SHORTEST_POLL_S if len(waiting) < before else pause * 1.5
            # A poll for thousands takes a while: it uses half of the time at most, since others poll, too.
            pause = min(max(pause, time.monotonic() - started), LONGEST_POLL_S)
            time.sleep(max(min(pause, deadline - time.monotonic()), 0.0))


def build_messages(
    nodes: Iterable[int], task: object, *, kind: str, ttl: float, group: str = ""
) -> dict[int, Message]:
    """Build the message of each node, which expires after `ttl` seconds; all share one record in memory."""
    record = to_record(task)
    return {
        node: Message(record, dst_node_id=node, message_type=kind, ttl=ttl, group_id=group) for node in nodes
    }


def match_replies(sent: Mapping[int, Message], replies: Iterable[Message]) -> Iterator[SiteReply]:
    """Yield each reply with its node, and at the end the nodes that sent none.

    An error message of Flower's own, about a node that went away, has the server as its sender; the message
    that it replies to names the node. A second reply of one node is ignored. All messages have one record.
    """
    by_message = {message.metadata.message_id: node for node, message in sent.items()}
    waiting = dict.fromkeys(sent)
    bytes_down = next((wire_bytes(message.content) for message in sent.values()), 0)
    for reply in replies:
        node = by_message.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        if node in waiting:
            del waiting[node]
            yield _site_reply(node, bytes_down, reply)
        del reply  # the loop variable would keep it in memory while the next one is awaited
    for node in waiting:
        yield SiteReply(node=node, bytes_down=bytes_down, timed_out=True)


def _site_reply(node: int, bytes_down: int, reply: Message) -> SiteReply:
    if reply.has_content():
        record, size = reply.content, wire_bytes(reply.content)
        try:
            traces = digest(fields_of(record))
        except (KeyError, TypeError):  # not one of FedSigma's records: it will be rejected
            traces = {"bytes": size}
        return SiteReply(node=node, bytes_down=bytes_down, content=record, bytes_up=size, traces=traces)
    cause = _FLOWER_ERRORS.get(reply.error.code, "")
    # FedSigma's sites send the name of a type. Any other text was written by someone else: it is dropped.
    kind = reply.error.reason if _TYPE_NAME.fullmatch(reply.error.reason or "") else ""
    failure = ": ".join(filter(None, (cause, kind)))
    return SiteReply(node=node, bytes_down=bytes_down, failure=failure or f"error {reply.error.code}")
