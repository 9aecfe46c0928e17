"""The processes of a site: the node, which connects to the server, and the worker, which reads the images."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fedsigma.client.deployment.home import SiteHome
from fedsigma.common.config.schema import split_address
from fedsigma.common.ops.flower_process import flower_command
from fedsigma.common.ops.supervisor import Process, flower_environment

__all__ = ["node_process", "worker_process"]

# Other programs that a SuperExec could be asked to start.
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


def node_process(site: SiteHome) -> Process:
    """Return the node: it has the key for the server, one outbound connection, and no images."""
    folder, connection = site.path / "node", site.connection
    host, port = split_address(connection.listen or connection.node, where="listen")
    command = flower_command("flower-supernode", "--superlink", connection.address)
    command += ["--root-certificates", str(folder / "sites.crt")]
    command += ["--auth-supernode-private-key", str(folder / "node.key")]
    command += ["--isolation", "process", "--host", host, "--port", str(port)]
    command += ["--superexec-auth-secret-file", str(folder / "superexec.secret")]
    command += ["--node-config", f"site-name={json.dumps(connection.site)}"]
    if connection.node_health:
        command += ["--health-server-address", connection.node_health]
    environment = flower_environment(folder / "flwr")
    return Process(
        name="node", command=command, environment=environment, health=connection.node_health, after=1
    )


def worker_process(site: SiteHome) -> Process:
    """Return the worker: it reads images, runs approved bundles, and connects to the node only.

    Raises:
        ConfigError: site.yaml is invalid.
    """
    folder, connection, policy = site.path / "worker", site.connection, site.read_policy()
    command = flower_command("flower-superexec", "--insecure", "--runtime-api-address", connection.node)
    command += ["--superexec-auth-secret-file", str(folder / "superexec.secret")]
    if connection.worker_health:
        command += ["--health-server-address", connection.worker_health]
    environment = flower_environment(folder / "flwr")
    environment |= {
        "PATH": os.pathsep.join([str(_write_programs(folder / "bin")), environment["PATH"]]),
        "FEDSIGMA_SITE": str(site.path / "site.yaml"),
        "HF_HUB_OFFLINE": "1",  # the worker has no internet
    }
    if policy.cpus:
        environment |= {"OMP_NUM_THREADS": str(policy.cpus), "MKL_NUM_THREADS": str(policy.cpus)}
    if policy.gpus != "auto":
        environment["CUDA_VISIBLE_DEVICES"] = "" if policy.gpus == "none" else policy.gpus
    return Process(
        name="worker", command=command, environment=environment, health=connection.worker_health, after=2
    )


def _write_programs(folder: Path) -> Path:
    """Write the programs that come before Flower's own on the worker's PATH."""
    folder.mkdir(exist_ok=True)
    texts = {"flwr-clientapp": _GUARD.format(python=sys.executable)}
    texts |= {name: _REFUSAL.format(python=sys.executable, name=name) for name in _REFUSED}
    for name, text in texts.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
        file.chmod(0o755)
    return folder
