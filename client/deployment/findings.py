"""What a check of a site found: all is well, or a problem with its next step."""

from __future__ import annotations

from dataclasses import dataclass

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["CheckFailed", "CheckResult"]


class CheckFailed(FedSigmaError):
    """What is wrong, and what to do.

    Args:
        what: in one sentence.
        todo: the next step.
    """

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.detail, self.remedy = detail, remedy


@dataclass(frozen=True)
class CheckResult:
    """One check: its name, whether all is well, what was seen, and what to do if it is not."""

    check: str
    ok: bool
    detail: str
    remedy: str = ""
