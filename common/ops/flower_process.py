"""Run one of Flower's programs in a process that ends when the program returns.

Flower's SuperNode returns when the SuperLink's certificate is refused, but a thread of its health server
keeps the process alive and healthy, so that it would never be restarted.

Arguments: the program's name, such as flower-supernode, and its arguments.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import entry_points

from fedsigma.common.utils.errors import FAILED

__all__ = ["flower_command", "main"]


def flower_command(name: str, *arguments: str) -> list[str]:
    """Return the command that runs one of Flower's programs in this way."""
    return [sys.executable, "-P", "-m", __name__, name, *arguments]


def main(name: str) -> None:
    """Run the program of this name with the arguments of this process; does not return.

    Raises:
        SystemExit: The program ended the process itself, and has cleaned up.
    """
    (program,) = entry_points(group="console_scripts", name=name)
    try:
        program.load()()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
    print(f"FedSigma: {name} has ended, and its process with it", file=sys.stderr, flush=True)
    os._exit(FAILED)


if __name__ == "__main__":
    # The program parses sys.argv, and prints argv[0] in its help.
    sys.argv = sys.argv[1:]
    main(sys.argv[0])
