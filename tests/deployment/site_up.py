"""`fedsigma site up`, with the node and the worker each in a network namespace of its own.

Arguments: the site's folder; the namespaces' names, or two empty words for none. A containers' engine would
start the same two commands.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.deployment.services import site_processes
from fedsigma.common.ops.supervisor import Process, supervise


def placed(process: Process, folder: Path, namespace: str) -> Process:
    """The command that becomes this one process, in a namespace."""
    enter = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
    command = [str(Path(sys.executable).parent / "fedsigma"), "site", "up", "--only", process.name]
    return replace(process, command=[*enter, *command, "--folder", str(folder)], environment={})


if __name__ == "__main__":
    site = SiteHome(Path(sys.argv[1]))
    found = [placed(p, site.path, n) for p, n in zip(site_processes(site), sys.argv[2:], strict=True)]
    supervise(found, site.path)
