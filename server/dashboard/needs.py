"""What the dashboard needs that FedSigma itself does not: the extra `dashboard`."""

from __future__ import annotations

from importlib.util import find_spec

from fedsigma.server.dashboard.auth.passwords import AccountsError

__all__ = ["check_installed"]

_MODULES = (
    "starlette",
    "uvicorn",
    "argon2",
    "limits",
    "authlib",
    "httpx",
    "python_multipart",
    "itsdangerous",
    "prometheus_client",
)


def check_installed() -> None:
    """Find out before anything of the dashboard is imported.

    Raises:
        AccountsError: a package of the extra is not there.
    """
    for name in _MODULES:
        if find_spec(name) is None:
            raise AccountsError(f"{name} is not installed: pip install 'fedsigma[dashboard]'")
