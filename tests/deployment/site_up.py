"""`fedsigma site up`, with the node and the worker each in a network namespace of its own.

Arguments: the site's folder; the namespaces' names, or two empty words for none. A containers' engine would
start the same two commands.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.deployment.services import node_process, worker_process
from fedsigma.common.ops.supervisor import Process, supervise


def placed(process: Process, folder: Path, namespace: str) -> Process:
    """The command that becomes this one process, in a namespace."""
    enter = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
    command = [str(Path(sys.executable).parent / "fedsigma"), "site", "up", "--only", process.name]
    return replace(process, command=[*enter, *command, "--folder", str(folder)], environment={})


if __name__ == "__main__":
    site = SiteHome(Path(sys.argv[1]))
    node, worker = sys.argv[2:]
    processes = [placed(node_process(site), site.path, node), placed(worker_process(site), site.path, worker)]
    supervise(processes, site.path)
