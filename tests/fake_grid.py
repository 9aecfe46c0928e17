"""Drive a ServerApp against a ClientApp in one process: no Ray, no SuperLink."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # a Message needs an identity outside a task process

SERVER = 1
Tamper = Callable[[int, Message, Message], "Message | None"]


class FakeGrid(Grid):
    """Nodes 100, 101, ... answer at once. `tamper(node, task, reply)` may change a reply or return None.

    Messages take the way through Flower's own serialisation only as objects: what arrives is what was sent.
    """

    def __init__(
        self,
        client_app: Any,
        sites: int,
        *,
        node_config: dict[str, Any] | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER
        self.app, self.tamper = client_app, tamper
        self.away: set[int] = set()
        self.asked: list[tuple[int, str]] = []
        self._numbers = itertools.count()
        self._pushed: dict[str, Message] = {}
        self.contexts = {
            100 + i: Context(
                run_id=1,
                node_id=100 + i,
                node_config={"partition-id": i, "num-partitions": sites, **(node_config or {})},
                state=RecordDict(),
                run_config={},
            )
            for i in range(sites)
        }

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [node for node in self.contexts if node not in self.away]

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = name = f"m{next(self._numbers)}"
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            self._pushed[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        tasks = [self._pushed.pop(name) for name in message_ids if name in self._pushed]
        return [reply for task in tasks if (reply := self._answer(task)) is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if node in self.away:
            return None
        try:
            reply = self.app(message, self.contexts[node])
        except Exception as error:
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)
        return self.tamper(node, message, reply) if self.tamper else reply


def gone(task: Message, code: int = 5) -> Message:
    """The error that Flower makes up for a node that went away: it seems to come from the server."""
    reply = Message(Error(code, "Node Unavailable: /secret/path"), reply_to=task)
    reply.metadata.__dict__["_src_node_id"] = SERVER
    return reply
