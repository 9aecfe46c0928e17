"""`fedsigma dashboard` of a folder of runs, as a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from fedsigma.common.ops.supervisor import free_ports

PROGRAM = Path(sys.executable).with_name("fedsigma")


@contextmanager
def dashboard(folder: Path) -> Iterator[tuple[str, str]]:
    """The dashboard's address, and the link that lets one browser in."""
    (port,) = free_ports(1)
    command = [str(PROGRAM), "dashboard", str(folder), "--listen", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = re.search(r"http://\S+", process.stdout.readline())
    assert told
    base = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{base}/health")
            break
        except httpx.TransportError:
            time.sleep(0.05)
    try:
        yield base, told[0]
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
