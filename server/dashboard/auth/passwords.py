"""Rules for user names, roles and passwords; length counts, not character classes (NIST SP 800-63B)."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "METRICS",
    "OPERATOR",
    "ROLES",
    "VIEWER",
    "AccountsError",
    "check_name",
    "check_password",
    "check_role",
    "normalize_password",
]

VIEWER, OPERATOR, METRICS = "viewer", "operator", "metrics"
ROLES = (VIEWER, OPERATOR)
"""Roles of users; `metrics` is the role of programs' tokens in lists."""

MIN_LENGTH, MAX_LENGTH = 12, 128
"""Limits of a password's length, in characters."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")


class AccountsError(FedSigmaError, ValueError):
    """A user, name, role or password is invalid, or a package for accounts is not installed."""


def normalize_password(password: str) -> str:
    """Return the Unicode normal form (NFKC), so that all keyboards produce the same password."""
    return unicodedata.normalize("NFKC", password)


def check_name(name: str) -> None:
    """Reject names that could be confused with others, or that are unsafe in a log.

    Raises:
        AccountsError: The name is not 1 to 64 lower-case letters, digits, `.`, `_`, `@` and `-`.
    """
    if not _NAME.fullmatch(name):
        raise AccountsError(
            f"invalid name {name[:80]!r}: expected 1 to 64 lower-case letters, digits, '.', '_', '@' or '-',"
            " starting with a letter or digit"
        )


def check_role(role: str) -> None:
    """Reject roles that are not in `ROLES`."""
    if role not in ROLES:
        raise AccountsError(f"unknown role '{role}', expected {' or '.join(ROLES)}")


def check_password(password: str, *, name: str) -> None:
    """Reject passwords that are easy to guess; the messages do not contain the password.

    Raises:
        AccountsError: It is too short, too long, the user's name, or a repeated or counted pattern.
    """
    text = normalize_password(password)
    if not MIN_LENGTH <= len(text) <= MAX_LENGTH:
        raise AccountsError(
            f"the password has {len(text)} characters, expected {MIN_LENGTH} to {MAX_LENGTH}:"
            " use several words"
        )
    for word in (name, "fedsigma", "password"):
        if not text.casefold().replace(word, ""):
            raise AccountsError(f"the password only consists of '{word}': choose one that cannot be guessed")
    if _is_repetition(text) or _is_sequence(text):
        raise AccountsError("the password is a repeated or counted pattern: choose another")


def _is_repetition(text: str) -> bool:
    """Return whether at most four characters are repeated, or fewer than four differ."""
    return len(set(text)) < 4 or any(text[:-n] == text[n:] for n in (1, 2, 3, 4))


def _is_sequence(text: str) -> bool:
    """Return whether each character follows the one before it, up or down, as in 123456789012."""
    steps = {ord(b) - ord(a) for a, b in pairwise(text)}
    if text.isdecimal():
        # 0 follows 9.
        steps = {step % 10 for step in steps}
    return steps in ({1}, {-1}, {9})
