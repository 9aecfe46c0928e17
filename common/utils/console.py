"""The exit codes of the command, as docs/errors.md tells them. Click itself uses 2 for wrong usage."""

from __future__ import annotations

__all__ = ["BAD_INPUT", "FAILED", "PROBLEMS"]

FAILED = 1
"""Something unexpected happened, or what was waited for did not end well."""
BAD_INPUT = 3
"""The input, or what it names, cannot be used."""
PROBLEMS = 4
"""A check ran, and found problems."""
