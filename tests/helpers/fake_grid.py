"""A federation in one process, with sites that go away and replies that are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from fedsigma.client.app import app as client
from fedsigma.common.ops.flower_compat import set_source_node
from fedsigma.server.app import app as server
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.in_process import SERVER, InProcessGrid

Tamper = Callable[[int, Message, Message], "Message | None"]


class FakeGrid(InProcessGrid):
    """Nodes 100, 101, ... answer at once. `tamper(node, task, reply)` may change a reply or return None.

    Messages take the way through Flower's own serialisation only as objects: what arrives is what was sent.
    """

    def __init__(self, client_app: Any, sites: int, *, tamper: Tamper | None = None, **more: Any) -> None:
        super().__init__(client_app, sites, **more)
        self.tamper = tamper
        self.away: set[int] = set()
        self.asked: list[tuple[int, str]] = []

    def get_node_ids(self) -> list[int]:
        return [node for node in self.contexts if node not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = list(messages)
        self.asked += [(one.metadata.dst_node_id, one.metadata.message_type) for one in pushed]
        return super().push_messages(pushed)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return list(super().send_and_receive(messages, timeout=timeout))

    def answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if node in self.away:
            return None
        reply = super().answer(message)
        return self.tamper(node, message, reply) if self.tamper and reply is not None else reply


def gone(task: Message, code: int = 5) -> Message:
    """The error that Flower makes up for a node that went away: it seems to come from the server."""
    reply = Message(Error(code, "Node Unavailable: /secret/path"), reply_to=task)
    set_source_node(reply, SERVER)
    return reply


def run_in_process(study: Path, out: Path, *, sites: int) -> RunDir:
    """Run a study file with both real apps in this process."""
    config = {"study": str(study), "out": str(out), "resume": False, "seed": -1, "rounds": 0}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    server(FakeGrid(client, sites), context)
    return RunDir.open(out)
