"""The long-running processes of a server or a site: one of them in this process's place, or all, supervised.

Supervision is supervisord's: a process that ends is started again, after a pause that grows while it keeps
failing; logs are rotated; ending the supervisor ends all of them in order. systemd or a container engine
takes its place where each process has a unit or a container of its own.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "Process",
    "ProcessError",
    "State",
    "call",
    "flower_environment",
    "free_ports",
    "restart",
    "running",
    "states",
    "stop",
    "supervise",
]

# A path of a Unix socket longer than this is refused by the kernel.
_LONGEST_SOCKET = 100


class ProcessError(FedSigmaError, RuntimeError):
    """A process cannot be started or reached."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One long-running process.

    Fields: name; command; environment, besides this process's own; health, HOST:PORT of its gRPC health
    service, if it has one; needs, a program that it runs in turn; after, the order of starting, smaller first
    (and of stopping, reversed); patience_s, how long it may take to stop.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str = ""
    needs: str = ""
    after: int = 0
    patience_s: int = 20

    def program(self) -> str:
        """The path of its program.

        Raises:
            ProcessError: it, or what it needs, is not installed.
        """
        if self.needs:
            _program(self.needs)
        return _program(self.command[0])

    def replace_this(self, folder: Path) -> None:
        """Become this process; returns only by an error.

        Raises:
            ProcessError: the program is not installed.
        """
        program = self.program()
        os.chdir(folder)
        os.execve(program, [program, *self.command[1:]], {**os.environ, **self.environment})


@dataclass(frozen=True)
class State:
    """How a supervised process is: `RUNNING`, `BACKOFF` and so on; its pid (0: none), and words to read."""

    name: str
    state: str
    pid: int
    description: str


def flower_environment(home: Path) -> dict[str, str]:
    """What every process of Flower's is told: its home, and to install, report and look for nothing."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        # The programs of this environment first, even where it is not activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses now; somebody else may take one the next moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def supervise(processes: Sequence[Process], folder: Path) -> None:
    """Become a supervisor of these processes, in the foreground; returns only by an error.

    SIGTERM or Ctrl-C stops them all and ends it with 0.

    Args:
        processes: to start.
        folder: of the server or site; logs go to its logs/.

    Raises:
        ProcessError: they run already, or a program is not installed.
    """
    if running(folder):
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


def running(folder: Path) -> bool:
    """Whether a supervisor of this folder answers."""
    try:
        call(folder, "supervisor.getState")
    except ProcessError:
        return False
    return True


def states(folder: Path) -> list[State]:
    """How each process of this folder is.

    Raises:
        ProcessError: no supervisor of this folder runs.
    """
    return [
        State(one["name"], one["statename"], int(one["pid"]), one["description"])
        for one in call(folder, "supervisor.getAllProcessInfo")
    ]


def restart(folder: Path, name: str) -> None:
    """Stop one process of this folder and start it again.

    Raises:
        ProcessError: no supervisor of this folder runs, or it has no such process.
    """
    call(folder, "supervisor.stopProcess", name, True)
    call(folder, "supervisor.startProcess", name, False)


def stop(folder: Path) -> None:
    """Stop all processes of this folder, and their supervisor.

    Raises:
        ProcessError: no supervisor of this folder runs.
    """
    call(folder, "supervisor.shutdown")


def _program(name: str) -> str:
    found = shutil.which(name, path=flower_environment(Path())["PATH"])
    if found is None:
        raise ProcessError(f"the program '{name}' is not installed, or not on PATH")
    return found


def _socket(folder: Path) -> Path:
    """Where the supervisor of a folder listens: in it, or in a folder of the user's if that is too long."""
    inside = folder / "logs" / "supervisor.sock"
    if len(str(inside)) <= _LONGEST_SOCKET:
        return inside
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"fedsigma-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid() or place.stat().st_mode & 0o077:
        raise ProcessError(f"{place} belongs to someone else or is open to others: remove it")
    return place / f"{digest}.sock"


def _configuration(processes: Sequence[Process], folder: Path) -> str:
    logs = Path(_plain(str(folder / "logs")))
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
            "command": " ".join(shlex.quote(_plain(word)) for word in process.command),
            "directory": str(folder),
            "environment": environment,
            "priority": str(process.after),
            "autorestart": "true",
            # It goes on trying for ever: a server that is down for a night must not end a site's node.
            "startretries": "1000000",
            "startsecs": "3",
            "stopwaitsecs": str(process.patience_s),
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


def _plain(value: str) -> str:
    """A value as supervisord reads it from its file, in which " ;" and " #" begin comments.

    Raises:
        ProcessError: it would read another.
    """
    if re.search(r"\n|\s[;#]", value):
        raise ProcessError(f"a value for the supervisor holds a comment or line break: {value[:80]!r}")
    return value.replace("%", "%%")


def _quoted(value: str) -> str:
    """An environment's value between double quotes; supervisord strips single ones from its ends.

    Raises:
        ProcessError: it would read another value.
    """
    if '"' in value or value != value.strip("'"):
        raise ProcessError(f"an environment value for the supervisor holds a quote: {value[:80]!r}")
    return f'"{_plain(value)}"'


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        """Connect to the socket, whatever the host."""
        return _Connection(self._path)


def call(folder: Path, method: str, *arguments: Any) -> Any:
    """Call the supervisor of a folder by supervisord's own interface.

    Raises:
        ProcessError: no supervisor of this folder runs, or it refuses.
    """
    proxy = xmlrpc.client.ServerProxy("http://localhost", transport=_Transport(_socket(folder)))
    function: Any = proxy
    for part in method.split("."):
        function = getattr(function, part)
    try:
        return function(*arguments)
    except xmlrpc.client.Fault as fault:
        raise ProcessError(f"the supervisor of {folder} says: {fault.faultString}") from fault
    except (OSError, http.client.HTTPException) as error:
        raise ProcessError(f"no processes of {folder} run here: start them with `up`") from error
