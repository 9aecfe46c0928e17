"""A grid that hands out replies as they come, a few at a time: no more of them than that are in memory.

Flower's own `send_and_receive` collects the replies of all sites before it returns the first. Messages are
pushed a few at a time, too, for Flower makes one request of those that it is given at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from logging import WARNING
from typing import Any

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run

__all__ = ["AT_ONCE", "StreamingGrid"]

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
