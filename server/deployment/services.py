"""The processes of a server: SuperLink, the worker that runs studies, keeper, proxy, and the dashboard."""

from __future__ import annotations

import sys

from fedsigma.common.config.schema import split_address
from fedsigma.common.ops.flower_process import flower_command
from fedsigma.common.ops.supervisor import Process, flower_environment
from fedsigma.server.deployment.home import ServerHome

__all__ = ["server_processes"]

_WHOLE = (sys.executable, "-P", "-m", "fedsigma.server.deployment.proxy_process")


def server_processes(folder: ServerHome) -> list[Process]:
    """The processes of a server, in the order of starting. The proxy's reads what `write_proxy_files` wrote.

    `worker` runs ServerApps apart from the SuperLink, so that a run outlives the SuperLink's restart;
    `keeper` goes on with runs whose process died; `dashboard` is there if there is a dashboard.yaml, and no
    other process needs it.
    """
    place, config = folder.path / "proxy", folder.config
    host, port = split_address(config.superlink, where="superlink")
    environment = flower_environment(folder.path / "flwr") | {
        "FEDSIGMA_SERVER": str(folder.path),
        "FEDSIGMA_RUNS": str(folder.path / "runs"),
    }
    tls = ["--ssl-ca-certfile", str(folder.tls("ca.crt")), "--ssl-certfile", str(folder.tls("inner.crt"))]
    tls += ["--ssl-keyfile", str(folder.tls("inner.key"))]
    secret = ["--superexec-auth-secret-file", str(folder.secret)]
    superlink = flower_command("flower-superlink", "--host", host, "--port", str(port))
    superlink += ["--isolation", "process"]
    superlink += [*tls, *secret, "--enable-supernode-auth", "--database", str(folder.path / "state.db")]
    superlink += ["--health-server-address", config.health, "--disable-runtime-dependency-installation"]
    worker = flower_command("flower-superexec", "--runtime-api-address", folder.control)
    worker += ["--root-certificates", str(folder.tls("ca.crt")), *secret]
    worker += ["--health-server-address", config.worker_health]
    keeper = [sys.executable, "-P", "-m", "fedsigma.server.deployment.auto_resume", str(folder.path)]
    found = [
        Process(name="superlink", command=superlink, environment=environment, health=config.health, after=1),
        Process(name="worker", command=worker, environment=environment, health=config.worker_health, after=2),
        Process(name="keeper", command=keeper, environment=environment, after=3),
    ]
    if (folder.path / "dashboard.yaml").is_file():
        dashboard = [sys.executable, "-P", "-m", "fedsigma.cli.main", "dashboard", str(folder.path)]
        found.append(Process(name="dashboard", command=dashboard, environment=environment, after=5))
    if config.proxy == "nginx":
        command = [*_WHOLE, "nginx", "-c", str(place / "nginx.conf"), "-p", str(place / "run")]
        # Before its configuration is read, nginx would write into a folder of the system's.
        command += ["-e", "stderr"]
        found.append(Process(name="proxy", command=command, needs="nginx", after=4))
    elif config.proxy == "caddy":
        command = [*_WHOLE, "caddy", "run", "--config", str(place / "Caddyfile"), "--adapter", "caddyfile"]
        home = {"HOME": str(place / "run"), "XDG_CONFIG_HOME": str(place / "run")}
        found.append(Process(name="proxy", command=command, environment=home, needs="caddy", after=4))
    return found
