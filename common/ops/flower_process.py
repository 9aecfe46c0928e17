"""One of Flower's programs as a process that ends when its work does.

Flower's SuperNode gives up when the SuperLink's certificate is refused, and returns; but a thread of its own
web server keeps the process alive, deaf, and well by its own word. Nobody would start it again. Here the
process ends with the program.

Arguments: the program's name, such as flower-supernode, and its arguments.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import entry_points

__all__ = ["flower_command", "main"]

ENDED_BY_ITSELF = 1


def flower_command(name: str, *arguments: str) -> list[str]:
    """The command of one of Flower's programs, as `Process` takes it."""
    return [sys.executable, "-P", "-m", __name__, name, *arguments]


def main(name: str) -> None:
    """Run the program of this name with the arguments of this process; does not return.

    Raises:
        SystemExit: the program ended itself, as by a signal, and has cleaned up.
    """
    (program,) = entry_points(group="console_scripts", name=name)
    try:
        program.load()()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
    print(f"FedSigma: {name} has ended, and its process with it", file=sys.stderr, flush=True)
    os._exit(ENDED_BY_ITSELF)


if __name__ == "__main__":
    # The program reads its arguments from here, and says its name in its help.
    sys.argv = sys.argv[1:]
    main(sys.argv[0])
