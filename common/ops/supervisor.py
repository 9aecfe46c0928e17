"""Run the long-running processes of a server or a site: one in place of this process, or all, supervised.

Supervision is supervisord's: a process that ends is restarted, after a pause that grows while it keeps
failing; logs are rotated; all processes end in order with their supervisor. Where each process has a systemd
unit or a container of its own, these take supervisord's place.
"""

from __future__ import annotations

import configparser
import hashlib
import http.client
import io
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import xmlrpc.client
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "Process",
    "ProcessError",
    "State",
    "call",
    "flower_environment",
    "free_ports",
    "is_running",
    "restart",
    "states",
    "stop",
    "supervise",
]

# The kernel refuses longer paths of Unix sockets (108 bytes on Linux).
_MAX_SOCKET_PATH = 100


class ProcessError(FedSigmaError, RuntimeError):
    """A process cannot be started or reached."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One long-running process.

    Attributes:
        name: Name of the process.
        command: Program and arguments.
        environment: Environment variables besides those of this process.
        health: HOST:PORT of its gRPC health service; empty if it has none.
        needs: Another program that must be installed, since `command` runs it; empty for none.
        after: Order of starting, smallest first, and of stopping, reversed.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str = ""
    needs: str = ""
    after: int = 0

    def program(self) -> str:
        """Return the path of its program.

        Raises:
            ProcessError: It, or what it needs, is not installed.
        """
        if self.needs:
            _find_program(self.needs)
        return _find_program(self.command[0])

    def replace_this(self, folder: Path) -> None:
        """Replace the running process by this one.

        Raises:
            ProcessError: The program is not installed.
        """
        program = self.program()
        os.chdir(folder)
        os.execve(program, [program, *self.command[1:]], {**os.environ, **self.environment})


@dataclass(frozen=True)
class State:
    """State of a supervised process.

    Attributes:
        name: Name of the process.
        state: `RUNNING`, `BACKOFF` and so on.
        pid: Its number; 0 if it is not running.
    """

    name: str
    state: str
    pid: int


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: no installations, update checks or telemetry."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        # The programs of this environment first, even if it is not activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def free_ports(count: int) -> list[int]:
    """Return unused ports of 127.0.0.1; another process may take one before its use."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]


def supervise(processes: Sequence[Process], folder: Path) -> None:
    """Replace this process by a supervisor of these processes, until SIGTERM or Ctrl-C.

    Args:
        processes: Processes to start.
        folder: Folder of the server or site; logs are written to its logs/.

    Raises:
        ProcessError: They are running already, or a program is not installed.
    """
    if is_running(folder):
        raise ProcessError(f"the processes of {folder} run already: stop them with `down` first")
    for process in processes:
        process.program()
    (folder / "logs").mkdir(exist_ok=True)
    file = folder / "logs" / "supervisord.conf"
    file.write_text(_configuration(processes, folder), encoding="utf-8")
    file.chmod(0o600)
    os.chdir(folder)
    supervisor = [sys.executable, "-P", "-m", "fedsigma.common.ops.supervisord"]
    os.execv(sys.executable, [*supervisor, "--nodaemon", "--configuration", str(file)])


def is_running(folder: Path) -> bool:
    """Return whether a supervisor of this folder answers."""
    try:
        call(folder, "supervisor.getState")
    except ProcessError:
        return False
    return True


def states(folder: Path) -> list[State]:
    """Return the state of each process of this folder.

    Raises:
        ProcessError: No supervisor of this folder is running.
    """
    infos = call(folder, "supervisor.getAllProcessInfo")
    return [State(info["name"], info["statename"], int(info["pid"])) for info in infos]


def restart(folder: Path, name: str) -> None:
    """Restart one process of this folder.

    Raises:
        ProcessError: No supervisor of this folder is running, or it has no such process.
    """
    call(folder, "supervisor.stopProcess", name, True)
    call(folder, "supervisor.startProcess", name, False)


def stop(folder: Path) -> None:
    """Stop all processes of this folder, and their supervisor.

    Raises:
        ProcessError: No supervisor of this folder is running.
    """
    call(folder, "supervisor.shutdown")


def call(folder: Path, method: str, *arguments: Any) -> Any:
    """Call a method of supervisord's XML-RPC interface.

    Raises:
        ProcessError: No supervisor of this folder is running, or it returns an error.
    """
    transport = SupervisorTransport(serverurl=f"unix://{_socket(folder)}")
    try:
        with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as proxy:
            return attrgetter(method)(proxy)(*arguments)
    except xmlrpc.client.Fault as fault:
        raise ProcessError(f"the supervisor of {folder} reports: {fault.faultString}") from fault
    except (OSError, http.client.HTTPException) as error:
        raise ProcessError(f"no processes of {folder} run here: start them with `up`") from error


def _find_program(name: str) -> str:
    path = shutil.which(name, path=flower_environment(Path())["PATH"])
    if path is None:
        raise ProcessError(f"the program '{name}' is not installed, or not on PATH")
    return path


def _socket(folder: Path) -> Path:
    """Return the path of the supervisor's socket: in logs/, or in /tmp if that path is too long."""
    path = folder / "logs" / "supervisor.sock"
    if len(str(path)) <= _MAX_SOCKET_PATH:
        return path
    parent = Path(tempfile.gettempdir()) / f"fedsigma-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.stat().st_uid != os.getuid() or parent.stat().st_mode & 0o077:
        raise ProcessError(f"{parent} belongs to another user or is open to others: remove it")
    return parent / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.sock"


def _configuration(processes: Sequence[Process], folder: Path) -> str:
    logs = Path(_checked(str(folder / "logs")))
    config = configparser.RawConfigParser()
    config["unix_http_server"] = {"file": str(_socket(folder)), "chmod": "0700"}
    config["supervisord"] = {
        "logfile": str(logs / "supervisor.log"),
        "pidfile": str(logs / "supervisor.pid"),
        "childlogdir": str(logs),
        "identifier": "fedsigma",
    }
    factory = "supervisor.rpcinterface:make_main_rpcinterface"
    config["rpcinterface:supervisor"] = {"supervisor.rpcinterface_factory": factory}
    for process in processes:
        environment = ",".join(f"{key}={_quoted(value)}" for key, value in process.environment.items())
        config[f"program:{process.name}"] = {
            "command": " ".join(shlex.quote(_checked(argument)) for argument in process.command),
            "directory": str(folder),
            "environment": environment,
            "priority": str(process.after),
            "autorestart": "true",
            # A server that is down for a night must not end a site's node.
            "startretries": "1000000",
            "startsecs": "3",
            "stopwaitsecs": "20",
            "stopasgroup": "true",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": str(logs / f"{process.name}.log"),
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "5",
        }
    text = io.StringIO()
    config.write(text)
    return text.getvalue()


def _checked(value: str) -> str:
    """Return a value as supervisord's file needs it, in which " ;" and " #" begin comments.

    Raises:
        ProcessError: The value contains one of these.
    """
    if re.search(r"\n|\s[;#]", value):
        raise ProcessError(f"a value for the supervisor holds a comment or line break: {value[:80]!r}")
    return value.replace("%", "%%")


def _quoted(value: str) -> str:
    """Return an environment value in double quotes; supervisord strips single ones from its ends.

    Raises:
        ProcessError: The value contains a quote that supervisord would remove.
    """
    if '"' in value or value != value.strip("'"):
        raise ProcessError(f"an environment value for the supervisor holds a quote: {value[:80]!r}")
    return f'"{_checked(value)}"'
