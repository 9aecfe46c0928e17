"""Sending tasks to sites and attributing what comes back: the server's wrapper around Flower's messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsigma.common.describing import describe
from fedsigma.common.protocol import fields_of, to_content, wire_bytes

__all__ = ["Answer", "Exchange", "attribute"]

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
class Answer:
    """What came back from one site: a record, or the reason why not, or nothing in time.

    bytes_down is the size of the task that was sent.
    """

    node: int
    bytes_down: int
    content: RecordDict | None = None
    failure: str = ""

    @property
    def late(self) -> bool:
        """Whether no reply of any kind came in time."""
        return self.content is None and not self.failure

    @property
    def gone(self) -> bool:
        """Whether nothing came for want of the way to the site, or its machine, and not by its own word."""
        return self.late or self.failure in (_FLOWER_ERRORS[3], _FLOWER_ERRORS[5], _FLOWER_ERRORS[8])

    @property
    def bytes_up(self) -> int:
        """The size of the reply, 0 if there was none."""
        return 0 if self.content is None else wire_bytes(self.content)

    @property
    def traces(self) -> dict[str, Any]:
        """What the site's own log says of the reply, bytes and sha256; nothing if there was none."""
        if self.content is None:
            return {}
        try:
            told = describe(fields_of(self.content))
        except (KeyError, TypeError):  # not a record of ours, which is rejected
            return {"bytes": self.bytes_up}
        return {"bytes": told["bytes"], "sha256": told["sha256"]}


class Exchange:
    """Asks the sites that are online."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def online(self) -> set[int]:
        """Return the node ids of the sites that are connected now."""
        return set(self.grid.get_node_ids())

    def message(self, node: int, task: object, *, kind: str, timeout: float, group: str) -> Message:
        """Build the message that carries a task to one site. Units: timeout in seconds."""
        ttl = timeout + GRACE_S
        return Message(to_content(task), dst_node_id=node, message_type=kind, ttl=ttl, group_id=group)

    def ask(
        self, tasks: Mapping[int, object], *, kind: str, timeout: float, group: str = ""
    ) -> dict[int, Answer]:
        """Send each site its task and wait for the replies, at most `timeout` seconds."""
        sent = {
            node: self.message(node, task, kind=kind, timeout=timeout, group=group)
            for node, task in tasks.items()
        }
        return self.send(sent, timeout=timeout)

    def send(self, sent: Mapping[int, Message], *, timeout: float) -> dict[int, Answer]:
        """Send each site its message and wait for the replies, at most `timeout` seconds."""
        return attribute(sent, self.grid.send_and_receive(list(sent.values()), timeout=timeout))


def attribute(sent: Mapping[int, Message], replies: Iterable[Message]) -> dict[int, Answer]:
    """Say for every site that was asked what came back, in the order in which they were asked.

    An error that Flower itself makes, for a site that went away, does not say which site it is about: its
    sender is the server. What it replies to does. A second reply of one site is ignored.
    """
    by_message = {message.metadata.message_id: node for node, message in sent.items()}
    found: dict[int, Message] = {}
    for reply in replies:
        node = by_message.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        if node in sent:
            found.setdefault(node, reply)
    return {node: _answer(node, message, found.get(node)) for node, message in sent.items()}


def _answer(node: int, sent: Message, reply: Message | None) -> Answer:
    down = wire_bytes(sent.content)
    if reply is None:
        return Answer(node=node, bytes_down=down)
    if reply.has_content():
        return Answer(node=node, bytes_down=down, content=reply.content)
    known = _FLOWER_ERRORS.get(reply.error.code, "")
    # FedSigma's sites tell a type's name. Any other text was not written by us, so it is not repeated.
    kind = reply.error.reason if _TYPE_NAME.fullmatch(reply.error.reason or "") else ""
    told = f"{known}: {kind}" if known and kind else known or kind
    return Answer(node=node, bytes_down=down, failure=told or f"error {reply.error.code}")
