"""A federation in one process: the real apps, with messages passed as objects instead of sent.

For many small studies in sequence, where starting Flower's processes would take longer than the study. Sites
reply one after the other; a message has the same content as on the wire.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsigma.common.ops.flower_compat import ErrorCode, NodeInfo, set_message_id, set_task_identity

__all__ = ["InProcessGrid"]

SERVER = 1
FIRST_NODE = 100


class InProcessGrid(Grid):
    """Runs a ClientApp as each of its nodes: a message is handled when its reply is pulled.

    Args:
        app: The sites' ClientApp.
        sites: Number of sites; node 100 is the first.
        node_config: Configuration of every node, besides its number.
        run_id: Number of the run, by which sites store its state; drawn by default, as in Flower.
    """

    def __init__(
        self,
        app: ClientApp,
        sites: int,
        *,
        node_config: dict[str, Any] | None = None,
        run_id: int | None = None,
    ) -> None:
        set_task_identity(SERVER)
        self.app = app
        self.run_id = secrets.randbits(62) + 1 if run_id is None else run_id
        self._numbers = itertools.count()
        self._pushed: dict[str, Message] = {}
        self.contexts = {
            FIRST_NODE + number: Context(
                run_id=self.run_id,
                node_id=FIRST_NODE + number,
                node_config={"partition-id": number, "num-partitions": sites, **(node_config or {})},
                state=RecordDict(),
                run_config={},
            )
            for number in range(sites)
        }

    def set_run(self, run: Any) -> None:
        """Do nothing: there is only one run."""

    @property
    def run(self) -> Any:
        """Not available."""
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: use `Message`."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid.get_node_ids`."""
        return list(self.contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """See `Grid.get_nodes`."""
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Store the messages; returns their ids."""
        ids = []
        for message in messages:
            message_id = f"m{next(self._numbers)}"
            set_message_id(message, message_id)
            self._pushed[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the sites on these messages, and return their replies."""
        tasks = [self._pushed.pop(name) for name in message_ids if name in self._pushed]
        return [reply for task in tasks if (reply := self.answer(task)) is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See `Grid.send_and_receive`."""
        return self.pull_messages(self.push_messages(messages))

    def answer(self, message: Message) -> Message | None:
        """Return the reply of one site; an error of its app becomes an error reply, as in Flower."""
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)
