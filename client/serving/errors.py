"""What goes wrong with a request, as problem details (RFC 9457): which there are, how they are answered."""

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
    """A kind of problem: its status, what it means, a header of its answer, whether the connection ends."""

    status: HTTPStatus
    meaning: str
    header: tuple[str, str] | None = None
    closes_connection: bool = False


_RETRY = ("Retry-After", str(RETRY_S))
PROBLEMS = {
    "malformed": ProblemType(
        HTTPStatus.BAD_REQUEST, "The form cannot be read, or has no file named `images`."
    ),
    "unauthorized": ProblemType(
        HTTPStatus.UNAUTHORIZED, "The bearer token is missing or wrong.", ("WWW-Authenticate", "Bearer")
    ),
    "body-too-slow": ProblemType(
        HTTPStatus.REQUEST_TIMEOUT, "The body did not arrive in time.", closes_connection=True
    ),
    "body-too-large": ProblemType(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body has too many bytes."),
    "too-many-images": ProblemType(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "There are too many images or frames."
    ),
    "too-many-pixels": ProblemType(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "An image has too many pixels."),
    "not-a-form": ProblemType(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body is not multipart/form-data."),
    "not-an-image": ProblemType(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A file is, by its first bytes, no image of a kind that is read."
    ),
    "unreadable-image": ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "An image of a known kind is damaged or of a form that is not read."
    ),
    "too-many-requests": ProblemType(
        HTTPStatus.TOO_MANY_REQUESTS, "This client has too many requests under way.", _RETRY
    ),
    "failed": ProblemType(HTTPStatus.INTERNAL_SERVER_ERROR, "A fault of the service."),
    "busy": ProblemType(
        HTTPStatus.SERVICE_UNAVAILABLE, "The service has too much to do, or is stopping.", _RETRY
    ),
}


class ProblemDetails(BaseModel):
    """A problem as RFC 9457 has it; `code` and `image` are FedSigma's own."""

    type: str = Field(
        default="about:blank", description="Always about:blank: status and code say what it is."
    )
    title: str = Field(description="The status in words.", examples=["Unprocessable Content"])
    status: int = Field(description="The HTTP status.", examples=[422])
    detail: str = Field(
        description="What was found and what was expected.", examples=["Image 2 cannot be decoded."]
    )
    code: str = Field(description="A fixed word for programs.", examples=["unreadable-image"])
    image: int | None = Field(
        default=None, description="Which image of the request it is about, counted from 1.", examples=[2]
    )


class Problem(Exception):
    """Ends a request with a problem.

    Args:
        code: one of `PROBLEMS`.
        detail: what was found and expected; no name of a file, and nothing of an image.
        image: which image of the request, counted from 1.
    """

    def __init__(self, code: str, detail: str, *, image: int | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.image = code, detail, image


def _phrase(status: int) -> str:
    # Two were renamed by RFC 9110, which not every Python follows.
    renamed = {413: "Content Too Large", 422: "Unprocessable Content"}
    return renamed.get(status) or HTTPStatus(status).phrase


def _details(status: int, code: str, detail: str, image: int | None = None) -> dict[str, Any]:
    title = _phrase(status)
    found = ProblemDetails(title=title, status=status, detail=detail, code=code, image=image)
    return found.model_dump(exclude_none=True)


def _problem_response(details: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(details, details["status"], headers, MEDIA_TYPE)


def add_problem_handlers(app: FastAPI) -> None:
    """Have every error of an app answered as a problem."""

    async def known(_: Request, problem: Exception) -> Response:
        assert isinstance(problem, Problem)
        kind = PROBLEMS[problem.code]
        headers = dict([kind.header] if kind.header else [])
        if kind.closes_connection:
            headers["Connection"] = "close"
        return _problem_response(_details(kind.status, problem.code, problem.detail, problem.image), headers)

    async def by_status(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = _phrase(error.status_code)
        code = phrase.lower().replace(" ", "-")
        return _problem_response(_details(error.status_code, code, f"{phrase}."), error.headers)

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it

    async def unexpected(_: Request, __: Exception) -> Response:
        return _problem_response(_details(500, "failed", "A fault of the service; its log names the kind."))

    app.add_exception_handler(Problem, known)
    app.add_exception_handler(HTTPException, by_status)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unexpected)


class RedactErrors:
    """Around an app: an unexpected error is logged by its type alone.

    Its text and its trace can hold what was in a request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            logger.error("unexpected %s", type(error).__name__)


def problem_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The problems of an operation, as its OpenAPI responses."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = PROBLEMS[code]
        one = found.setdefault(
            int(kind.status),
            {
                "description": "",
                "content": {
                    MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}, "examples": {}}
                },
            },
        )
        one["description"] = f"{one['description']} {kind.meaning}".strip()
        if kind.header:
            name, value = kind.header
            one["headers"] = {name: {"schema": {"type": "string"}, "required": True, "example": value}}
        example = _details(kind.status, code, kind.meaning)
        one["content"][MEDIA_TYPE]["examples"][code] = {"value": example}
    return found
