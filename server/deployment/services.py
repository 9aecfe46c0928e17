"""The processes of a server: SuperLink, the worker that runs studies, auto-resume, proxy, and dashboard."""

from __future__ import annotations

import sys

from fedsigma.common.config.schema import split_address
from fedsigma.common.ops.flower_process import flower_command
from fedsigma.common.ops.supervisor import Process, flower_environment
from fedsigma.server.deployment.home import ServerHome

__all__ = ["server_processes"]

_PYTHON = (sys.executable, "-P", "-m")
_PROXY_PROCESS = (*_PYTHON, "fedsigma.server.deployment.proxy_process")


def server_processes(home: ServerHome) -> list[Process]:
    """Return the processes of a server, in the order of starting.

    `worker` runs ServerApps apart from the SuperLink, so that a run survives a restart of the SuperLink.
    `auto-resume` resumes runs whose process died. `proxy` reads the files of `write_proxy_files`. `dashboard`
    is included if the folder has a dashboard.yaml; no other process needs it.
    """
    folder, config = str(home.path), home.config
    host, port = split_address(config.superlink, where="superlink")
    environment = flower_environment(home.path / "flwr")
    environment |= {"FEDSIGMA_SERVER": folder, "FEDSIGMA_RUNS": f"{folder}/runs"}
    authority, secret = str(home.tls("ca.crt")), ["--superexec-auth-secret-file", str(home.secret)]
    superlink = flower_command("flower-superlink", "--host", host, "--port", str(port), *secret)
    superlink += ["--isolation", "process", "--enable-supernode-auth", "--ssl-ca-certfile", authority]
    superlink += ["--ssl-certfile", str(home.tls("inner.crt")), "--ssl-keyfile", str(home.tls("inner.key"))]
    superlink += ["--database", f"{folder}/state.db", "--disable-runtime-dependency-installation"]
    superlink += ["--health-server-address", config.health]
    worker = flower_command("flower-superexec", "--runtime-api-address", home.control, *secret)
    worker += ["--root-certificates", authority, "--health-server-address", config.worker_health]
    auto_resume = [*_PYTHON, "fedsigma.server.deployment.auto_resume", folder]
    processes = [
        Process(name="superlink", command=superlink, environment=environment, health=config.health, after=1),
        Process(name="worker", command=worker, environment=environment, health=config.worker_health, after=2),
        Process(name="auto-resume", command=auto_resume, environment=environment, after=3),
    ]
    if (home.path / "dashboard.yaml").is_file():
        dashboard = [*_PYTHON, "fedsigma.cli.main", "dashboard", folder]
        processes.append(Process(name="dashboard", command=dashboard, environment=environment, after=5))
    proxy, run = f"{folder}/proxy", f"{folder}/proxy/run"
    if config.proxy == "nginx":
        # -e: before it has read its configuration, nginx would log into a folder of the system.
        command = [*_PROXY_PROCESS, "nginx", "-c", f"{proxy}/nginx.conf", "-p", run, "-e", "stderr"]
        processes.append(Process(name="proxy", command=command, needs="nginx", after=4))
    elif config.proxy == "caddy":
        command = [
            *_PROXY_PROCESS,
            "caddy",
            "run",
            "--config",
            f"{proxy}/Caddyfile",
            "--adapter",
            "caddyfile",
        ]
        folders = {"HOME": run, "XDG_CONFIG_HOME": run}
        processes.append(Process(name="proxy", command=command, environment=folders, needs="caddy", after=4))
    return processes
