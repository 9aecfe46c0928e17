"""Results of the checks of a site."""

from __future__ import annotations

from dataclasses import dataclass

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["CheckFailed", "CheckResult"]


class CheckFailed(FedSigmaError):
    """A check failed.

    Args:
        detail: The problem, in one sentence.
        remedy: The next step.
    """

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.detail, self.remedy = detail, remedy


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        check: Name of the check.
        ok: Whether it passed.
        detail: Result in one sentence.
        remedy: The next step, if it failed.
    """

    check: str
    ok: bool
    detail: str
    remedy: str = ""
