"""Security headers of every response: no external content, no inline scripts, no embedding in frames."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["POLICY", "SecurityHeadersMiddleware"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The content security policy of pages that do not set a stricter one."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: browsers would send `Origin: null` with forms, which older ones need to detect
    # forged requests.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_STATIC = "/static/"


class SecurityHeadersMiddleware:
    """Adds the headers to all responses of an ASGI app, including errors.

    Content-Security-Policy and Cache-Control are only added where the app has not set them.

    Args:
        app: The app.
        secure: Whether browsers connect by TLS; adds Strict-Transport-Security.
    """

    def __init__(self, app: ASGIApp, *, secure: bool) -> None:
        self._app = app
        self._headers = dict(_HEADERS)
        if secure:
            self._headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                headers.setdefault("Content-Security-Policy", POLICY)
                headers.setdefault("Cache-Control", _cache_control(scope, message["status"]))
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def _cache_control(scope: Scope, status: int) -> str:
    """Return `Cache-Control`: static files with a version never change; other responses are not stored."""
    versioned = scope["path"].startswith(_STATIC) and scope["query_string"].startswith(b"v=")
    return "private, max-age=31536000, immutable" if versioned and status in (200, 304) else "no-store"
