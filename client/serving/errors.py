"""Errors of requests as problem details (RFC 9457)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = [
    "PROBLEMS",
    "Problem",
    "ProblemDetails",
    "RedactErrors",
    "add_problem_handlers",
    "problem_responses",
]

logger = logging.getLogger("fedsigma.serving")

MEDIA_TYPE = "application/problem+json"
RETRY_S = 1


@dataclass(frozen=True)
class ProblemType:
    """A type of problem.

    Attributes:
        status: HTTP status.
        meaning: Meaning, for the OpenAPI document.
        header: A header of the response.
        closes_connection: Whether the connection is closed after the response.
    """

    status: int
    meaning: str
    header: tuple[str, str] | None = None
    closes_connection: bool = False


_RETRY = ("Retry-After", str(RETRY_S))
_BEARER = ("WWW-Authenticate", "Bearer")
PROBLEMS = {
    "malformed": ProblemType(400, "The form is invalid, or has no file named `images`."),
    "unauthorized": ProblemType(401, "The bearer token is missing or wrong.", _BEARER),
    "body-too-slow": ProblemType(408, "The body did not arrive in time.", closes_connection=True),
    "body-too-large": ProblemType(413, "The body has too many bytes."),
    "too-many-images": ProblemType(413, "There are too many images or frames."),
    "too-many-pixels": ProblemType(413, "An image has too many pixels."),
    "not-a-form": ProblemType(415, "The body is not multipart/form-data."),
    "not-an-image": ProblemType(415, "A file is not an image of a supported format."),
    "unreadable-image": ProblemType(
        422, "An image is damaged, or uses an unsupported variant of its format."
    ),
    "too-many-requests": ProblemType(429, "This client has too many active requests.", _RETRY),
    "failed": ProblemType(500, "Internal error of the service."),
    "busy": ProblemType(503, "The service is overloaded or stopping.", _RETRY),
}


class ProblemDetails(BaseModel):
    """Problem details of RFC 9457, with `code` and `image` as extensions."""

    type: str = Field(
        default="about:blank", description="Always about:blank; status and code identify the problem."
    )
    title: str = Field(description="Reason phrase of the status.", examples=["Unprocessable Content"])
    status: int = Field(description="The HTTP status.", examples=[422])
    detail: str = Field(
        description="The problem, and what was expected.", examples=["Image 2 cannot be decoded."]
    )
    code: str = Field(description="Identifier of the problem, for programs.", examples=["unreadable-image"])
    image: int | None = Field(
        default=None, description="Number of the image in the request, from 1.", examples=[2]
    )


class Problem(Exception):
    """Ends a request with a problem.

    Args:
        code: One of `PROBLEMS`.
        detail: The problem and what was expected; it must not contain file names or image content.
        image: Number of the image in the request, from 1.
    """

    def __init__(self, code: str, detail: str, *, image: int | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.image = code, detail, image


def _phrase(status: int) -> str:
    # RFC 9110 renamed two phrases; older Pythons have the old ones.
    renamed = {413: "Content Too Large", 422: "Unprocessable Content"}
    return renamed.get(status) or HTTPStatus(status).phrase


def _details(status: int, code: str, detail: str, image: int | None = None) -> dict[str, Any]:
    title = _phrase(status)
    problem = ProblemDetails(title=title, status=status, detail=detail, code=code, image=image)
    return problem.model_dump(exclude_none=True)


def add_problem_handlers(app: FastAPI) -> None:
    """Make an app respond to every error with problem details."""

    def respond(details: dict[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(details, details["status"], headers, MEDIA_TYPE)

    @app.exception_handler(Problem)
    async def _(_: Request, problem: Problem) -> Response:
        kind = PROBLEMS[problem.code]
        headers = dict([kind.header] if kind.header else [])
        if kind.closes_connection:
            headers["Connection"] = "close"
        return respond(_details(kind.status, problem.code, problem.detail, problem.image), headers)

    @app.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> Response:
        phrase = _phrase(error.status_code)
        code = phrase.lower().replace(" ", "-")
        return respond(_details(error.status_code, code, f"{phrase}."), error.headers)

    @app.exception_handler(ClientDisconnect)
    async def _(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody receives it

    @app.exception_handler(Exception)
    async def _(_: Request, __: Exception) -> Response:
        return respond(_details(500, "failed", "Internal error; the service's log has its type."))


class RedactErrors:
    """Middleware that logs unexpected errors by their type only; their text could contain request data."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            logger.error("unexpected %s", type(error).__name__)


def problem_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of an operation's problems."""
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = PROBLEMS[code]
        content = {"schema": {"$ref": "#/components/schemas/ProblemDetails"}, "examples": {}}
        new = {"description": "", "content": {MEDIA_TYPE: content}}
        response: dict[str, Any] = responses.setdefault(kind.status, new)
        response["description"] = f"{response['description']} {kind.meaning}".strip()
        if kind.header:
            name, value = kind.header
            response["headers"] = {name: {"schema": {"type": "string"}, "required": True, "example": value}}
        example = {"value": _details(kind.status, code, kind.meaning)}
        response["content"][MEDIA_TYPE]["examples"][code] = example
    return responses
