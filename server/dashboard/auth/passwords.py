"""What does as a user's name and as a password: its length counts, not its kinds (NIST SP 800-63B)."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["AccountsError", "check_name", "check_password", "plain"]

SHORTEST, LONGEST = 12, 128
"""Of a password, in characters."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")


class AccountsError(FedSigmaError, ValueError):
    """A user, name, role or password that does not do, or something for accounts that is not installed."""


def plain(password: str) -> str:
    """The one form of a password that keyboards may write differently (NFKC)."""
    return unicodedata.normalize("NFKC", password)


def check_name(name: str) -> None:
    """Refuse a name that two people could take for the same, or that would not do in a log.

    Raises:
        AccountsError: it is not 1 to 64 small letters, digits, `.`, `_`, `@` and `-`.
    """
    if not _NAME.fullmatch(name):
        raise AccountsError(
            f"the name is {name[:80]!r}, expected 1 to 64 small letters, digits, '.', '_', '@' or '-',"
            " beginning with a letter or digit"
        )


def check_password(password: str, *, name: str) -> None:
    """Refuse a password that would be guessed.

    Raises:
        AccountsError: it is short, very long, the name, or a few characters repeated. It is not told.
    """
    text = plain(password)
    if not SHORTEST <= len(text) <= LONGEST:
        raise AccountsError(
            f"the password has {len(text)} characters, expected {SHORTEST} to {LONGEST}: a few words do well"
        )
    for word in (name, "fedsigma", "password"):
        if not text.casefold().replace(word, ""):
            raise AccountsError(f"the password is '{word}' and nothing else: choose one that nobody guesses")
    if _repeated(text) or _counted(text):
        raise AccountsError("the password is a few characters repeated or counted up: choose another")


def _repeated(text: str) -> bool:
    """Whether at most four characters are repeated, or hardly any differ."""
    return len(set(text)) < 4 or any(text[:-n] == text[n:] for n in (1, 2, 3, 4))


def _counted(text: str) -> bool:
    """Whether each character follows the one before it, up or down, as in 123456789012."""
    pairs = list(pairwise(text))
    steps = {ord(b) - ord(a) for a, b in pairs}
    if text.isdecimal():
        # After 9 comes 0.
        steps = {(int(b) - int(a)) % 10 for a, b in pairs}
    return steps in ({1}, {-1}, {9})
