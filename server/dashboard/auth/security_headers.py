"""What every answer tells the browser: load nothing from elsewhere, run nothing inline, be in no frame."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["POLICY", "SecurityHeadersMiddleware"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The content security policy of a page that does not bring a stricter one."""

_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: browsers then send `Origin: null` with forms, and older ones send nothing else by
    # which a forged request could be told from one of our pages.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_STATIC = "/static/"


class SecurityHeadersMiddleware:
    """Adds the headers to all answers of an ASGI app, errors too.

    Content-Security-Policy and Cache-Control are left where the app has set them.

    Args:
        app: the app.
        secure: whether browsers come by TLS: they are told to keep to it.
    """

    def __init__(self, app: ASGIApp, *, secure: bool) -> None:
        self._app = app
        self._always = dict(_ALWAYS)
        if secure:
            self._always["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self._always)
                headers.setdefault("Content-Security-Policy", POLICY)
                headers.setdefault("Cache-Control", _caching(scope, message["status"]))
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def _caching(scope: Scope, status: int) -> str:
    """A static file that is named with its version never changes; all else is not to be kept."""
    versioned = scope["path"].startswith(_STATIC) and scope["query_string"].startswith(b"v=")
    return "private, max-age=31536000, immutable" if versioned and status in (200, 304) else "no-store"
