"""Flower's Control interface, by the `flwr` command: the only module that knows its arguments and output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsigma.common.ops.supervisor import flower_environment
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.server.deployment.home import ServerHome

__all__ = ["ControlError", "FlowerControl", "Node"]

CONNECTION = "server"
TIMEOUT_S = 120


class ControlError(FedSigmaError, RuntimeError):
    """The SuperLink does not answer, or refuses."""


@dataclass(frozen=True)
class Node:
    """A registered node.

    Attributes:
        node_id: Flower's id of the node.
        status: `online`, `offline`, `registered` (never online) or `unregistered`.
        last_seen: When it was last online, as Flower prints it; empty if never.
    """

    node_id: str
    status: str
    last_seen: str


class FlowerControl:
    """Control of a server's SuperLink.

    Args:
        home: The server's folder.

    Attributes:
        environment: Environment variables of the `flwr` command.
    """

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self.environment = {**os.environ, **flower_environment(home.path / "flwr")}

    def register(self, public_key: str) -> str:
        """Admit a node.

        Args:
            public_key: Its key in OpenSSH's format.

        Returns:
            Flower's id of the node.

        Raises:
            ControlError: The SuperLink does not answer, or has this key already.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
            file.write(public_key)
            file.flush()
            reply = self._flwr(["supernode", "register", file.name, CONNECTION])
        return str(reply["node-id"])

    def unregister(self, node_id: str) -> None:
        """Exclude a node: its next request is refused.

        Raises:
            ControlError: The SuperLink does not answer, or has no such node.
        """
        self._flwr(["supernode", "unregister", node_id, CONNECTION])

    def nodes(self) -> dict[str, Node]:
        """Return all registered nodes by id.

        Raises:
            ControlError: The SuperLink does not answer.
        """
        entries = self._flwr(["supernode", "list", CONNECTION]).get("nodes", [])
        return {
            str(entry["node-id"]): Node(
                node_id=str(entry["node-id"]),
                status=str(entry["status"]),
                last_seen=str(entry.get("online-at") or entry.get("last-activated-at") or ""),
            )
            for entry in entries
        }

    def runs(self) -> dict[str, str]:
        """Return the status of all runs by number.

        It is `pending`, `starting`, `running`, or `finished:` with `completed`, `failed` or `stopped`.

        Raises:
            ControlError: The SuperLink does not answer.
        """
        entries = self._flwr(["ls", CONNECTION]).get("runs", [])
        return {str(entry["run-id"]): str(entry["status"]) for entry in entries}

    def start(self, app: Path, values: dict[str, Any]) -> str:
        """Start a run of an app.

        Args:
            app: Folder of the Flower app.
            values: The run configuration.

        Returns:
            The run's number.

        Raises:
            ControlError: The SuperLink does not answer, or refuses the app.
        """
        # JSON's strings, numbers and booleans are valid TOML.
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        return str(self._flwr(["run", str(app), CONNECTION, "--run-config", config])["run-id"])

    def stop(self, run_id: str) -> None:
        """Stop a run.

        Raises:
            ControlError: The SuperLink does not answer, or the run has ended.
        """
        self._flwr(["stop", run_id, CONNECTION])

    def log_command(self, run_id: str, *, follow: bool) -> list[str]:
        """Return the command that prints the log of a run's ServerApp."""
        return ["flwr", "log", run_id, CONNECTION, "--stream" if follow else "--show"]

    def _flwr(self, arguments: Sequence[str]) -> dict[str, Any]:
        # Each time, since server.yaml may have been edited or the folder moved.
        self._home.write_flower_config()
        try:
            done = subprocess.run(
                ["flwr", *arguments, "--format", "json"],
                env=self.environment,
                cwd=self._home.path,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise ControlError(
                f"the SuperLink at {self._home.control} did not answer in {TIMEOUT_S} s"
            ) from None
        reply = _json(done.stdout)
        if done.returncode or reply is None or reply.get("success") is False:
            raise ControlError(self._reason(reply, done.stdout + done.stderr))
        return reply

    def _reason(self, reply: dict[str, Any] | None, text: str) -> str:
        reason = str((reply or {}).get("error-message") or "") or text
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", reason).split())[-400:]
        if re.search(r"connect|unavailable|refused", reason, re.IGNORECASE):
            return f"the SuperLink at {self._home.control} does not answer: is `fedsigma server up` running?"
        return f"the SuperLink reports: {reason}"


def _json(text: str) -> dict[str, Any] | None:
    """Return the JSON object that `flwr` printed, which may follow other text."""
    start = text.find("{")
    try:
        reply = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None
