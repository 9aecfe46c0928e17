"""The processes of a server: SuperLink, the worker that runs studies, auto-resume, proxy, and dashboard."""

from __future__ import annotations

import sys

from fedsigma.common.config.schema import split_address
from fedsigma.common.ops.flower_process import flower_command
from fedsigma.common.ops.supervisor import Process, flower_environment
from fedsigma.server.deployment.home import ServerHome

__all__ = ["server_processes"]

_PROXY_PROCESS = (sys.executable, "-P", "-m", "fedsigma.server.deployment.proxy_process")


def server_processes(home: ServerHome) -> list[Process]:
    """Return the processes of a server, in the order of starting.

    `worker` runs ServerApps apart from the SuperLink, so that a run survives a restart of the SuperLink.
    `auto-resume` resumes runs whose process died. `proxy` reads the files of `write_proxy_files`. `dashboard`
    is included if the folder has a dashboard.yaml; no other process needs it.
    """
    proxy_folder, config = home.path / "proxy", home.config
    host, port = split_address(config.superlink, where="superlink")
    environment = flower_environment(home.path / "flwr") | {
        "FEDSIGMA_SERVER": str(home.path),
        "FEDSIGMA_RUNS": str(home.path / "runs"),
    }
    tls = ["--ssl-ca-certfile", str(home.tls("ca.crt")), "--ssl-certfile", str(home.tls("inner.crt"))]
    tls += ["--ssl-keyfile", str(home.tls("inner.key"))]
    secret = ["--superexec-auth-secret-file", str(home.secret)]
    superlink = flower_command("flower-superlink", "--host", host, "--port", str(port))
    superlink += ["--isolation", "process"]
    superlink += [*tls, *secret, "--enable-supernode-auth", "--database", str(home.path / "state.db")]
    superlink += ["--health-server-address", config.health, "--disable-runtime-dependency-installation"]
    worker = flower_command("flower-superexec", "--runtime-api-address", home.control)
    worker += ["--root-certificates", str(home.tls("ca.crt")), *secret]
    worker += ["--health-server-address", config.worker_health]
    auto_resume = [sys.executable, "-P", "-m", "fedsigma.server.deployment.auto_resume", str(home.path)]
    processes = [
        Process(name="superlink", command=superlink, environment=environment, health=config.health, after=1),
        Process(name="worker", command=worker, environment=environment, health=config.worker_health, after=2),
        Process(name="auto-resume", command=auto_resume, environment=environment, after=3),
    ]
    if (home.path / "dashboard.yaml").is_file():
        dashboard = [sys.executable, "-P", "-m", "fedsigma.cli.main", "dashboard", str(home.path)]
        processes.append(Process(name="dashboard", command=dashboard, environment=environment, after=5))
    run = str(proxy_folder / "run")
    if config.proxy == "nginx":
        command = [*_PROXY_PROCESS, "nginx", "-c", str(proxy_folder / "nginx.conf"), "-p", run]
        # Until it has read its configuration, nginx would write into a folder of the system.
        command += ["-e", "stderr"]
        processes.append(Process(name="proxy", command=command, needs="nginx", after=4))
    elif config.proxy == "caddy":
        command = [*_PROXY_PROCESS, "caddy", "run", "--config", str(proxy_folder / "Caddyfile")]
        command += ["--adapter", "caddyfile"]
        folders = {"HOME": run, "XDG_CONFIG_HOME": run}
        processes.append(Process(name="proxy", command=command, environment=folders, needs="caddy", after=4))
    return processes
