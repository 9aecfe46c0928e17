"""All names that FedSigma uses from Flower's private modules, which may move with any Flower release.

A name is imported when it is first used, so that programs without Flower start fast. No other module imports
`flwr.supercore`, `flwr.supernode`, `flwr.proto`, `flwr.cli` or `flwr.common`, or sets Flower's private
attributes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedsigma.common.utils.errors import FAILED, FedSigmaError

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.cli.build import build_fab_from_disk as build_fab_from_disk
    from flwr.common.constant import ErrorCode as ErrorCode
    from flwr.common.serde import user_config_to_proto as user_config_to_proto
    from flwr.proto.control_pb2 import ListNodesRequest as ListNodesRequest
    from flwr.proto.control_pb2 import ListRunsRequest as ListRunsRequest
    from flwr.proto.control_pb2 import RegisterNodeRequest as RegisterNodeRequest
    from flwr.proto.control_pb2 import StartRunRequest as StartRunRequest
    from flwr.proto.control_pb2 import StopRunRequest as StopRunRequest
    from flwr.proto.control_pb2 import UnregisterNodeRequest as UnregisterNodeRequest
    from flwr.proto.fab_pb2 import Fab as Fab
    from flwr.proto.fleet_pb2 import ActivateNodeRequest as ActivateNodeRequest
    from flwr.proto.node_pb2 import NodeInfo as NodeInfo
    from flwr.supercore.control.control_http_client import ControlHttpClient as ControlHttpClient
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError as ObjectPushError
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes as public_key_to_bytes
    from flwr.supercore.task_identity import TaskIdentity as TaskIdentity
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp as flwr_clientapp
    from flwr.supernode.fleet_http_client import FleetHttpClient as FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor as NodeAuthHttpInterceptor

__all__ = [
    "MODULES",
    "RUN_CLIENTAPP",
    "FlowerMoved",
    "clientapp_module",
    "list_runs",
    "set_message_id",
    "set_source_node",
    "set_task_identity",
]

MODULES = {
    "ActivateNodeRequest": "flwr.proto.fleet_pb2",
    "ControlHttpClient": "flwr.supercore.control.control_http_client",
    "ErrorCode": "flwr.common.constant",
    "Fab": "flwr.proto.fab_pb2",
    "FleetHttpClient": "flwr.supernode.fleet_http_client",
    "ListNodesRequest": "flwr.proto.control_pb2",
    "ListRunsRequest": "flwr.proto.control_pb2",
    "NodeAuthHttpInterceptor": "flwr.supernode.node_auth_http_interceptor",
    "NodeInfo": "flwr.proto.node_pb2",
    "ObjectPushError": "flwr.supercore.inflatable.inflatable_utils",
    "RegisterNodeRequest": "flwr.proto.control_pb2",
    "StartRunRequest": "flwr.proto.control_pb2",
    "StopRunRequest": "flwr.proto.control_pb2",
    "TaskIdentity": "flwr.supercore.task_identity",
    "UnregisterNodeRequest": "flwr.proto.control_pb2",
    "build_fab_from_disk": "flwr.cli.build",
    "flwr_clientapp": "flwr.supernode.cli.flwr_clientapp",
    "public_key_to_bytes": "flwr.supercore.primitives.asymmetric",
    "user_config_to_proto": "flwr.common.serde",
}
"""The private module of each name."""
RUN_CLIENTAPP = "flwr.supernode.runtime.run_clientapp"
"""The private module that runs one ClientApp; the guard replaces the functions in `GUARDED` in it."""
GUARDED = ("Error", "install_from_fab", "push_task_output")
"""The functions of `RUN_CLIENTAPP` that the guard replaces."""


class FlowerMoved(FedSigmaError, ImportError):
    """The installed Flower no longer has a name that FedSigma uses."""

    code = FAILED


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = _load(MODULES[name], name)
    return value


def clientapp_module() -> ModuleType:
    """Return Flower's module that runs one ClientApp, which has all names in `GUARDED`.

    Raises:
        FlowerMoved: The module or one of the names is missing.
    """
    for name in GUARDED:
        _load(RUN_CLIENTAPP, name)
    return import_module(RUN_CLIENTAPP)


def list_runs(client: ControlHttpClient) -> dict[str, str]:
    """Return the status of all runs of a SuperLink by number.

    It is `pending`, `starting`, `running`, or `finished:` with `completed`, `failed` or `stopped`.
    """
    request = _load(MODULES["ListRunsRequest"], "ListRunsRequest")()
    return {
        str(run.run_id): ":".join(filter(None, (run.status.status, run.status.sub_status)))
        for run in client.ListRuns(request).run_dict.values()
    }


def set_task_identity(node: int) -> None:
    """Make this process the task 1 of run 1 at a node, which a `Message` needs outside Flower's processes.

    Args:
        node: Flower's id of the node that sends the messages.
    """
    identity = _load(MODULES["TaskIdentity"], "TaskIdentity")
    identity.task_id, identity.run_id, identity.node_id = 1, 1, node


def set_message_id(message: Message, message_id: str) -> None:
    """Set a message's id, as Flower does when it takes the message."""
    _set_metadata(message, "_message_id", message_id)


def set_source_node(message: Message, node: int) -> None:
    """Set the id of the node that sent a message."""
    _set_metadata(message, "_src_node_id", node)


def _set_metadata(message: Message, attribute: str, value: object) -> None:
    values = message.metadata.__dict__
    if attribute not in values:
        raise _moved(f"the attribute {attribute} of a message's metadata")
    values[attribute] = value


def _load(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _moved(f"{module}.{name}") from error


def _moved(name: str) -> FlowerMoved:
    return FlowerMoved(
        f"Flower {version('flwr')} has no {name}: install the Flower version that pyproject.toml names, "
        f"or change {__name__}"
    )
