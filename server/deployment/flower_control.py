"""Control of a server's SuperLink: its nodes and runs, by Flower's own HTTP client."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedsigma.common.ops import flower_compat
from fedsigma.common.ops.supervisor import flower_environment
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.server.deployment.home import ServerHome

__all__ = ["ControlError", "FlowerControl", "Node"]

CONNECTION = "server"


class ControlError(FedSigmaError, RuntimeError):
    """The SuperLink does not answer, or refuses."""


@dataclass(frozen=True)
class Node:
    """A registered node.

    Attributes:
        node_id: Flower's id of the node.
        status: `online`, `offline`, `registered` (never online) or `unregistered`.
        last_seen: When it last came online, in ISO 8601; empty if never.
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
        key = load_ssh_public_key(public_key.encode())
        assert isinstance(key, EllipticCurvePublicKey), "SiteKeys admits no other"
        request = flower_compat.RegisterNodeRequest(public_key=flower_compat.public_key_to_bytes(key))
        with self._client() as client:
            return str(client.RegisterNode(request).node_id)

    def unregister(self, node_id: str) -> None:
        """Exclude a node: its next request is refused.

        Raises:
            ControlError: The SuperLink does not answer, or has no such node.
        """
        with self._client() as client:
            client.UnregisterNode(flower_compat.UnregisterNodeRequest(node_id=int(node_id)))

    def nodes(self) -> dict[str, Node]:
        """Return all registered nodes by id.

        Raises:
            ControlError: The SuperLink does not answer.
        """
        with self._client() as client:
            reply = client.ListNodes(flower_compat.ListNodesRequest())
        return {
            str(node.node_id): Node(
                node_id=str(node.node_id), status=node.status, last_seen=node.last_activated_at
            )
            for node in reply.nodes_info
        }

    def runs(self) -> dict[str, str]:
        """Return the status of all runs by number.

        It is `pending`, `starting`, `running`, or `finished:` with `completed`, `failed` or `stopped`.

        Raises:
            ControlError: The SuperLink does not answer.
        """
        with self._client() as client:
            return flower_compat.list_runs(client)

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
        bundle = flower_compat.build_fab_from_disk(app)
        fab = flower_compat.Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        request = flower_compat.StartRunRequest(
            fab=fab, override_config=flower_compat.user_config_to_proto(values)
        )
        with self._client() as client:
            return str(client.StartRun(request).run_id)

    def stop(self, run_id: str) -> None:
        """Stop a run.

        Raises:
            ControlError: The SuperLink does not answer, or the run has ended.
        """
        with self._client() as client:
            client.StopRun(flower_compat.StopRunRequest(run_id=int(run_id)))

    def log_command(self, run_id: str, *, follow: bool) -> list[str]:
        """Return the command that prints the log of a run's ServerApp."""
        # Written each time, since server.yaml may have been edited or the folder moved.
        self._home.write_flower_config()
        return ["flwr", "log", run_id, CONNECTION, "--stream" if follow else "--show"]

    @contextmanager
    def _client(self) -> Iterator[flower_compat.ControlHttpClient]:
        """Connect to the SuperLink; a `flwr` process for each request would cost a second of a processor."""
        client = flower_compat.ControlHttpClient.from_server_address(
            self._home.control,
            insecure=False,
            root_certificates=self._home.tls("ca.crt").read_bytes(),
            interceptors=(),
        )
        try:
            yield client
        except httpx.HTTPStatusError as error:
            with suppress(ValueError, KeyError, TypeError):
                raise ControlError(f"the SuperLink reports: {error.response.json()['detail']}") from error
            raise ControlError(f"the SuperLink reports: {error}") from error
        except httpx.HTTPError as error:
            raise ControlError(
                f"the SuperLink at {self._home.control} does not answer: is `fedsigma server up` running?"
            ) from error
        finally:
            client.close()
