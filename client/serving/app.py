"""The service's addresses and its OpenAPI document."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp

from fedsigma.client.serving.errors import (
    Problem,
    ProblemDetails,
    RedactErrors,
    add_problem_handlers,
    problem_responses,
)
from fedsigma.client.serving.images import MEDIA_TYPES
from fedsigma.client.serving.schemas import NOTICE, Health, ModelInfo, Predictions
from fedsigma.client.serving.service import Service
from fedsigma.client.serving.uploads import FIELD, read_images
from fedsigma.common import __version__

__all__ = ["asgi", "create_app", "openapi_document"]

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="token",
    description="The token in the file that the service was started with, if it was started with one.",
)
# The token is asked for only where the service was started with one.
_OPEN: dict[str, Any] = {"security": [{}]}
_FORM: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "additionalProperties": False,
                "properties": {
                    FIELD: {
                        "type": "array",
                        "minItems": 1,
                        "description": "PNG, JPEG, TIFF (its first page) or DICOM files, told by content; "
                        "file names and types are not looked at.",
                        "items": {"type": "string", "format": "binary"},
                    }
                },
            },
            "encoding": {FIELD: {"contentType": ", ".join(MEDIA_TYPES)}},
        }
    },
}


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def _authorised(
    service: Annotated[Service, Depends(_service)],
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Service:
    if service.token is not None:
        told = given.credentials if given else ""
        if not hmac.compare_digest(told.encode(), service.token.encode()):
            raise Problem("unauthorized", "Send the header Authorization: Bearer TOKEN.")
    return service


Reachable = Annotated[Service, Depends(_service)]
Authorised = Annotated[Service, Depends(_authorised)]


def create_app(service: Service | None = None) -> FastAPI:
    """The application; without a service it is good for its document alone."""

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        assert service is not None
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="FedSigma",
        version=__version__,
        summary="Judges images with a finished study's model.",
        description=NOTICE,
        # Pages that would be loaded from elsewhere are left out; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        lifespan=running,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.service = service
    add_problem_handlers(app)
    _add_judging(app)
    _add_health(app)
    _complete(app)
    return app


def asgi(service: Service) -> ASGIApp:
    """The application as a server runs it: errors that nobody expected leave no trace in its log."""
    return RedactErrors(create_app(service))


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document, the same for every model."""
    return create_app().openapi()


def _add_judging(app: FastAPI) -> None:
    asked = (
        "malformed",
        "unauthorized",
        "body-too-slow",
        "body-too-large",
        "too-many-images",
        "too-many-pixels",
        "not-a-form",
        "not-an-image",
        "unreadable-image",
        "too-many-requests",
        "failed",
        "busy",
    )

    @app.post(
        "/v1/predict",
        tags=["judging"],
        operation_id="predict",
        summary="Judge one or several images",
        response_description="One judgement an image, in the order of the images.",
        responses=problem_responses(*asked),
        openapi_extra={"requestBody": _FORM, **_OPEN},
    )
    async def predict(request: Request, response: Response, service: Authorised) -> Predictions:
        """All images are judged or none: what is wrong with the first that cannot be is the answer."""
        response.headers["Cache-Control"] = "no-store"
        reading = True
        try:
            with service.admit(request.client.host if request.client else ""):
                async with asyncio.timeout(service.limits.timeout_s):
                    contents = await read_images(request, service.limits)
                    reading = False
                    return await service.predict(contents)
        except TimeoutError:
            seconds = f"{service.limits.timeout_s:g} seconds"
            if reading:
                raise Problem("body-too-slow", f"The body did not arrive within {seconds}.") from None
            raise Problem("busy", f"There was no answer within {seconds}: try later.") from None

    @app.get(
        "/v1/model",
        tags=["judging"],
        operation_id="model",
        summary="What is served",
        response_description="The model, its limits, and what it may be used for.",
        responses=problem_responses("unauthorized"),
        openapi_extra=_OPEN,
    )
    async def model(service: Authorised) -> ModelInfo:
        """The model's classes, version, digests, calibration and limits."""
        return service.info


def _add_health(app: FastAPI) -> None:
    @app.get(
        "/health",
        tags=["health"],
        operation_id="health",
        summary="Whether the service answers",
        response_description="It does.",
    )
    async def health() -> Health:
        """Needs no token."""
        return Health(status="ok")

    @app.get(
        "/ready",
        tags=["health"],
        operation_id="ready",
        summary="Whether images are judged",
        response_description="They are.",
        responses=problem_responses("busy"),
    )
    async def ready(service: Reachable) -> Health:
        """Needs no token."""
        if not service.batcher.ready:
            raise Problem("busy", "The service is starting or stopping.")
        return Health(status="ok")


def _complete(app: FastAPI) -> None:
    """Put into the document the schema that errors refer to, and what every address may answer."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        schemas = document["components"]["schemas"]
        schemas["ProblemDetails"] = ProblemDetails.model_json_schema(mode="serialization")
        return document

    app.openapi = openapi  # type: ignore[method-assign]
