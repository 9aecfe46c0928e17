"""The base class of FedSigma's exceptions, and the exit codes of its commands."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "PROBLEMS", "FedSigmaError", "InputError"]

FAILED = 1
"""An unexpected error, or a run that did not complete."""
BAD_INPUT = 3
"""The input, or a file or value that it names, is invalid."""
PROBLEMS = 4
"""A check ran and found problems."""
INTERRUPTED = 130
"""Ended by Ctrl-C, as shells report it (128 + SIGINT)."""


class FedSigmaError(Exception):
    """Base class of all errors that FedSigma raises on purpose, with a message for its user.

    Attributes:
        code: Exit code of a command that ends with this error; `docs/errors.md` lists them.
    """

    code: ClassVar[int] = BAD_INPUT


class InputError(FedSigmaError, ValueError):
    """A value that a caller or a command line gave is invalid."""
