"""Flower's Control interface, by the `flwr` command: the only place that knows its words and answers."""

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

__all__ = ["ControlError", "FlowerControl", "Node", "Run"]

CONNECTION = "server"
TIMEOUT_S = 120


class ControlError(FedSigmaError, RuntimeError):
    """The SuperLink does not answer, or refuses."""


@dataclass(frozen=True)
class Node:
    """A registered node. status: `online`, `offline`, `registered` (never seen) or `unregistered`."""

    node_id: str
    status: str
    last_seen: str


@dataclass(frozen=True)
class Run:
    """A run as Flower sees it. status: `pending`, `starting`, `running` or `finished:completed` and so on."""

    run_id: str
    status: str

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether it ended well."""
        return self.status == "finished:completed"


class FlowerControl:
    """What the server asks of its SuperLink."""

    def __init__(self, folder: ServerHome) -> None:
        self._folder = folder
        self.environment = {**os.environ, **flower_environment(folder.path / "flwr")}

    def register(self, public_key: str) -> str:
        """Let a node in.

        Args:
            public_key: in OpenSSH's form.

        Returns:
            The number that Flower gave it.

        Raises:
            ControlError: the SuperLink does not answer, or knows the key already.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
            file.write(public_key)
            file.flush()
            told = self._ask(["supernode", "register", file.name, CONNECTION])
        return str(told["node-id"])

    def unregister(self, node_id: str) -> None:
        """Shut a node out: its next request is refused.

        Raises:
            ControlError: the SuperLink does not answer, or knows no such node.
        """
        self._ask(["supernode", "unregister", node_id, CONNECTION])

    def nodes(self) -> dict[str, Node]:
        """All registered nodes by number.

        Raises:
            ControlError: the SuperLink does not answer.
        """
        told = self._ask(["supernode", "list", CONNECTION])
        found = {}
        for one in told.get("nodes", []):
            seen = one.get("online-at") or one.get("last-activated-at") or ""
            node = Node(str(one["node-id"]), str(one["status"]), str(seen))
            found[node.node_id] = node
        return found

    def runs(self) -> dict[str, Run]:
        """All runs by number.

        Raises:
            ControlError: the SuperLink does not answer.
        """
        told = self._ask(["ls", CONNECTION])
        return {
            str(one["run-id"]): Run(str(one["run-id"]), str(one["status"])) for one in told.get("runs", [])
        }

    def start(self, app: Path, values: dict[str, Any]) -> str:
        """Start a run of an app with this run configuration; returns its number.

        Raises:
            ControlError: the SuperLink does not answer, or refuses the app.
        """
        # JSON's texts, numbers and booleans are TOML's, too.
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        told = self._ask(["run", str(app), CONNECTION, "--run-config", config])
        return str(told["run-id"])

    def stop(self, run_id: str) -> None:
        """Stop a run.

        Raises:
            ControlError: the SuperLink does not answer, or the run is over.
        """
        self._ask(["stop", run_id, CONNECTION])

    def log_command(self, run_id: str, *, follow: bool) -> list[str]:
        """The command that prints the log of a run's ServerApp."""
        return ["flwr", "log", run_id, CONNECTION, "--stream" if follow else "--show"]

    def _ask(self, words: Sequence[str]) -> dict[str, Any]:
        # Anew each time: server.yaml may have been edited, or the folder moved.
        self._folder.write_flower_config()
        try:
            done = subprocess.run(
                ["flwr", *words, "--format", "json"],
                env=self.environment,
                cwd=self._folder.path,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise ControlError(
                f"the SuperLink at {self._folder.control} did not answer in {TIMEOUT_S} s"
            ) from None
        told = _json(done.stdout)
        if done.returncode or told is None or told.get("success") is False:
            raise ControlError(self._reason(told, done.stdout + done.stderr))
        return told

    def _reason(self, told: dict[str, Any] | None, text: str) -> str:
        said = str((told or {}).get("error-message") or "") or text
        said = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", said).split())[-400:]
        if re.search(r"connect|unavailable|refused", said, re.IGNORECASE):
            return (
                f"the SuperLink at {self._folder.control} does not answer: is `fedsigma server up` running?"
            )
        return f"the SuperLink says: {said}"


def _json(text: str) -> dict[str, Any] | None:
    """The JSON object in what `flwr` printed, which may have words before it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
