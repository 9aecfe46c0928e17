"""The processes of a site: the node, which talks to the server, and the worker, which sees the images."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fedsigma.client.deployment.home import SiteHome
from fedsigma.common.config.schema import split_address
from fedsigma.common.ops.flower_process import flower_command
from fedsigma.common.ops.supervisor import Process, flower_environment

__all__ = ["site_processes"]

# Whatever else a superexec could be told to start has no place at a hospital.
_REFUSED = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")
_GUARD = """\
#!{python}
from fedsigma.client.deployment.guarded_clientapp import main

main()
"""
_REFUSAL = """\
#!{python}
import sys

sys.exit("FedSigma: {name} does not run at a site")
"""


def site_processes(folder: SiteHome) -> list[Process]:
    """The two processes of a site, in the order of starting.

    Raises:
        ConfigError: site.yaml does not read.
    """
    return [node_process(folder), worker_process(folder)]


def node_process(folder: SiteHome) -> Process:
    """The node: holds the key to the server, sees no image, and needs one way out."""
    here, connection = folder.path / "node", folder.connection
    host, port = split_address(connection.listen or connection.node, where="listen")
    command = flower_command("flower-supernode", "--superlink", connection.address)
    command += ["--root-certificates", str(here / "sites.crt")]
    command += ["--auth-supernode-private-key", str(here / "node.key")]
    command += ["--isolation", "process", "--host", host, "--port", str(port)]
    command += ["--superexec-auth-secret-file", str(here / "superexec.secret")]
    command += ["--node-config", f"site-name={json.dumps(connection.site)}"]
    if connection.node_health:
        command += ["--health-server-address", connection.node_health]
    environment = flower_environment(here / "flwr")
    return Process(
        name="node", command=command, environment=environment, health=connection.node_health, after=1
    )


def worker_process(folder: SiteHome) -> Process:
    """The worker: sees images, runs approved bundles, and reaches nothing but the node."""
    here, connection, policy = folder.path / "worker", folder.connection, folder.read_policy()
    command = flower_command("flower-superexec", "--insecure", "--runtime-api-address", connection.node)
    command += ["--superexec-auth-secret-file", str(here / "superexec.secret")]
    if connection.worker_health:
        command += ["--health-server-address", connection.worker_health]
    environment = flower_environment(here / "flwr")
    programs = _write_programs(here / "bin")
    environment |= {
        "PATH": os.pathsep.join([str(programs), environment["PATH"]]),
        "FEDSIGMA_SITE": str(folder.path / "site.yaml"),
        # There is no way out, so no library should wait for one.
        "HF_HUB_OFFLINE": "1",
    }
    if policy.cpus:
        environment |= {"OMP_NUM_THREADS": str(policy.cpus), "MKL_NUM_THREADS": str(policy.cpus)}
    if policy.gpus != "auto":
        environment["CUDA_VISIBLE_DEVICES"] = "" if policy.gpus == "none" else policy.gpus
    return Process(
        name="worker", command=command, environment=environment, health=connection.worker_health, after=2
    )


def _write_programs(folder: Path) -> Path:
    """Write what the worker finds on its PATH before Flower's own programs."""
    folder.mkdir(exist_ok=True)
    texts = {"flwr-clientapp": _GUARD.format(python=sys.executable)}
    texts |= {name: _REFUSAL.format(python=sys.executable, name=name) for name in _REFUSED}
    for name, text in texts.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
        file.chmod(0o755)
    return folder
