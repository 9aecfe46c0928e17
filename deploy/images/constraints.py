"""Print constraints.txt: what FedSigma needs, in the versions of the environment that runs this.

`make constraints` does. The tests ran with these versions, so the images are built from them.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("dicom", "biomedclip", "dashboard")
# torch decides which CUDA libraries it needs: they differ between its CPU and CUDA builds.
LEFT_TO_TORCH = ("nvidia-", "cuda-", "triton")


def needed(name: str, extras: tuple[str, ...] = ()) -> dict[str, str]:
    """The versions of all that a distribution needs, by name, itself left out."""
    found: dict[str, str] = {}
    waiting = [(name, extras)]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        for line in distribution(name).requires or []:
            one = Requirement(line)
            if not any(one.marker is None or one.marker.evaluate({"extra": e}) for e in ("", *extras)):
                continue
            key = canonicalize_name(one.name)
            if key.startswith(LEFT_TO_TORCH) or (key, frozenset(one.extras)) in seen:
                continue
            seen.add((key, frozenset(one.extras)))
            found[key] = distribution(key).version.split("+")[0]
            waiting.append((key, tuple(one.extras)))
    return found


def main() -> None:
    """Print the file."""
    print("# Renewed by `make constraints`, from the environment that the tests ran in. Not to be edited.")
    print(f"# Python {sys.version_info.major}.{sys.version_info.minor}")
    for name, version in sorted(needed("fedsigma", EXTRAS).items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
