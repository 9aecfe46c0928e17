"""The proxy as one process that ends whole.

nginx's workers go on when their master is killed, and hold its port, so that no new master could start. Here
whatever ends the master ends its workers, and whatever ends this process ends the master.

Arguments: the proxy's command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run the proxy to its end; returns its exit code."""
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, pass_on)
    code = child.wait()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    # Only Linux can; elsewhere a killed parent leaves the proxy running.
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
