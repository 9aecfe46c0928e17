"""Sending tasks to sites and attributing what comes back: the server's wrapper around Flower's messages."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from logging import WARNING
from typing import Any, TypeVar

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run

from fedsigma.common.wire.digest import digest
from fedsigma.common.wire.records import fields_of, to_record, wire_bytes

__all__ = ["AT_ONCE", "Messenger", "SiteReply", "StreamingGrid", "in_order", "match_replies"]

T = TypeVar("T")

# What Flower's own error codes mean for the people who read the events.
_FLOWER_ERRORS = {
    2: "the site's app failed",
    3: "the site could not be reached in time",
    5: "the site went away",
    8: "the site's process ended",
}
_TYPE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")
# A message that nobody fetched is forgotten this long after the server stopped waiting for it.
GRACE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SiteReply:
    """What came back from one site: a record, or the reason why not, or nothing in time.

    bytes_down is the size of the task that was sent, bytes_up that of the reply, 0 if there was none. traces
    is what the site's own log says of the reply, bytes and sha256. late: no reply of any kind came in time.
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
        """Whether nothing came for want of the way to the site, or its machine, and not by its own word."""
        return self.timed_out or self.failure in (_FLOWER_ERRORS[3], _FLOWER_ERRORS[5], _FLOWER_ERRORS[8])

    def emptied(self) -> SiteReply:
        """The same without the record, which is most of it, once that is read."""
        return replace(self, content=None)


class Messenger:
    """Asks the sites that are online."""

    def __init__(self, grid: Grid) -> None:
        self.grid = StreamingGrid(grid)

    def online(self) -> set[int]:
        """Return the node ids of the sites that are connected now."""
        return set(self.grid.get_node_ids())

    def messages(
        self, tasks: Mapping[int, object], *, kind: str, timeout: float, group: str = ""
    ) -> dict[int, Message]:
        """Build the messages that carry each site its task. Units: timeout in seconds.

        Sites with the same task share one record, so that a task lies in memory once.
        """
        contents = {id(task): to_record(task) for task in _once(tasks.values())}
        ttl = timeout + GRACE_S
        return {
            node: Message(contents[id(task)], dst_node_id=node, message_type=kind, ttl=ttl, group_id=group)
            for node, task in tasks.items()
        }

    def send_tasks(
        self, tasks: Mapping[int, object], *, kind: str, timeout: float, group: str = ""
    ) -> Iterator[SiteReply]:
        """Send each site its task; the answers as they come, for at most `timeout` seconds."""
        return self.send(self.messages(tasks, kind=kind, timeout=timeout, group=group), timeout=timeout)

    def send(self, sent: Mapping[int, Message], *, timeout: float) -> Iterator[SiteReply]:
        """Send each site its message; the answers as they come, for at most `timeout` seconds."""
        return match_replies(sent, self.grid.send_and_receive(list(sent.values()), timeout=timeout))


def match_replies(sent: Mapping[int, Message], replies: Iterable[Message]) -> Iterator[SiteReply]:
    """Say of each reply which site it is of, as they come, and in the end which sites sent none.

    An error that Flower itself makes, for a site that went away, does not say which site it is about: its
    sender is the server. What it replies to does. A second reply of one site is ignored.
    """
    by_message = {message.metadata.message_id: node for node, message in sent.items()}
    contents = {node: message.content for node, message in sent.items()}
    sizes = {id(content): wire_bytes(content) for content in _once(contents.values())}
    waiting = {node: sizes[id(content)] for node, content in contents.items()}
    for reply in replies:
        node = by_message.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        if node in waiting:
            yield _answer(node, waiting.pop(node), reply)
        del reply  # the loop would hold it while the next one is waited for
    for node, down in waiting.items():
        yield SiteReply(node=node, bytes_down=down, timed_out=True)


def in_order(nodes: Iterable[int], answers: Iterable[SiteReply]) -> dict[int, SiteReply]:
    """All answers by node, in the order of `nodes`, so that what follows does not depend on who was first."""
    found = {answer.node: answer for answer in answers}
    return {node: found[node] for node in nodes}


def _once(things: Iterable[T]) -> Iterable[T]:
    """Each thing once, told apart by identity: tasks hold lists and cannot be compared quickly."""
    return {id(thing): thing for thing in things}.values()


def _answer(node: int, down: int, reply: Message) -> SiteReply:
    if reply.has_content():
        content = reply.content
        traces = _traces(content)
        return SiteReply(
            node=node, bytes_down=down, content=content, bytes_up=wire_bytes(content), traces=traces
        )
    known = _FLOWER_ERRORS.get(reply.error.code, "")
    # FedSigma's sites tell a type's name. Any other text was not written by us, so it is not repeated.
    kind = reply.error.reason if _TYPE_NAME.fullmatch(reply.error.reason or "") else ""
    told = f"{known}: {kind}" if known and kind else known or kind
    return SiteReply(node=node, bytes_down=down, failure=told or f"error {reply.error.code}")


def _traces(content: RecordDict) -> dict[str, Any]:
    try:
        return digest(fields_of(content))
    except (KeyError, TypeError):  # not a record of ours, which is rejected
        return {"bytes": wire_bytes(content)}


AT_ONCE = 32
"""The most messages that are pushed, and the most replies that are pulled, at a time."""
PUSH_AGAIN_S = (1.0, 5.0, 15.0)
"""How long to wait before messages are pushed again whose content the SuperLink did not take."""
SHORTEST_S, LONGEST_S = 0.1, 3.0
"""How long to wait before looking again: a little while replies come, longer while none do."""


class StreamingGrid(Grid):
    """A Flower grid whose `send_and_receive` sends at once and returns an iterator over the replies."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def set_run(self, run: Run) -> None:
        """See `Grid.set_run`."""
        self.grid.set_run(run)

    @property
    def run(self) -> Run:
        """See `Grid.run`."""
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """See `Grid.create_message`."""
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid.get_node_ids`."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """See `Grid.get_nodes`."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push the messages, `AT_ONCE` at a time; returns the ids of those that the grid took."""
        every = list(messages)
        taken: list[str] = []
        for start in range(0, len(every), AT_ONCE):
            taken += [one for one in self._push(every[start : start + AT_ONCE]) if one]
        return taken

    def _push(self, messages: list[Message]) -> list[str]:
        """Push messages, again if the SuperLink was started anew after it took them and before their content.

        It takes a message that it has already for the same, and asks for what it lacks.
        """
        for pause in PUSH_AGAIN_S:
            try:
                return list(self.grid.push_messages(messages))
            except ObjectPushError as error:
                log(WARNING, "%s The messages are pushed again.", error)
                time.sleep(pause)
        return list(self.grid.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there to these messages, pulled `AT_ONCE` at a time as they are taken."""
        every = list(message_ids)
        for start in range(0, len(every), AT_ONCE):
            found = list(self.grid.pull_messages(every[start : start + AT_ONCE]))
            found.reverse()
            while found:  # popped, so that a reply is the receiver's alone
                yield found.pop()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Push the messages; the iterator ends with the last reply, or `timeout` seconds after the push.

        A reply that came in time counts however long the receiver takes with those before it.
        """
        sent = self.push_messages(messages)
        end = None if timeout is None else time.monotonic() + timeout
        return self._replies(sent, end)

    def _replies(self, sent: list[str], end: float | None) -> Iterator[Message]:
        waiting, pause = dict.fromkeys(sent), SHORTEST_S
        while waiting:
            began, before = time.monotonic(), len(waiting)
            over = end is not None and began >= end
            for reply in self.pull_messages(waiting):
                waiting.pop(reply.metadata.reply_to_message_id, None)
                yield reply
                del reply
            if over or not waiting:
                return
            pause = SHORTEST_S if len(waiting) < before else pause * 1.5
            # To ask for thousands takes a while: no more than half of the time, for others ask, too.
            pause = min(max(pause, time.monotonic() - began), LONGEST_S)
            left = pause if end is None else min(pause, end - time.monotonic())
            time.sleep(max(left, 0.0))
