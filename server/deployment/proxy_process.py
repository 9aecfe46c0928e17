"""Run the proxy as one process that ends with all its children.

nginx's workers survive when their master is killed, and hold its port, so that no new master could start.
Here the workers end with the master, and the master with this process. nginx also opens its output by name,
which fails for a journal's socket or another user's pipe: here it writes to a pipe, which is copied to the
output of this process.

Arguments: the proxy's command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

from fedsigma.common.ops.supervisord import end_with_parent

__all__ = ["main"]


def main(command: list[str]) -> int:
    """Run the proxy to its end; returns its exit code."""
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    assert child.stdout is not None
    copier = threading.Thread(target=_copy_output, args=(child.stdout.fileno(),), daemon=True)
    copier.start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    code = child.wait()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    copier.join(timeout=5)
    return code if code >= 0 else 128 - code


def _copy_output(source: int) -> None:
    while chunk := os.read(source, 65536):
        # A reader that has closed the pipe must not stop the proxy.
        with suppress(OSError):
            os.write(sys.stdout.fileno(), chunk)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
