"""The service's endpoints and its OpenAPI document."""

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
# A token is required only if the service was started with one.
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
                        "description": "PNG, JPEG, TIFF (first page) or DICOM files, by content; "
                        "file names and declared types are ignored.",
                        "items": {"type": "string", "format": "binary"},
                    }
                },
            },
            "encoding": {FIELD: {"contentType": ", ".join(MEDIA_TYPES)}},
        }
    },
}


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _authorised(
    service: Annotated[Service, Depends(_service)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Service:
    if service.token is not None:
        token = credentials.credentials if credentials else ""
        if not hmac.compare_digest(token.encode(), service.token.encode()):
            raise Problem("unauthorized", "Send the header Authorization: Bearer TOKEN.")
    return service


Reachable = Annotated[Service, Depends(_service)]
Authorised = Annotated[Service, Depends(_authorised)]


def create_app(service: Service | None = None) -> FastAPI:
    """Create the application; without a service it provides the OpenAPI document only."""

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        assert service is not None
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="FedSigma",
        version=__version__,
        summary="Predicts images with a study's trained model.",
        description=NOTICE,
        # The pages that load scripts from elsewhere are off; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        lifespan=running,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.service = service
    add_problem_handlers(app)
    _add_predict(app)
    _add_health(app)
    _complete(app)
    return app


def asgi(service: Service) -> ASGIApp:
    """Create the application as a server runs it, which logs unexpected errors by their type only."""
    return RedactErrors(create_app(service))


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document, which is the same for every model."""
    return create_app().openapi()


def _add_predict(app: FastAPI) -> None:
    codes = (
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
        tags=["predict"],
        operation_id="predict",
        summary="Predict one or several images",
        response_description="One prediction an image, in the order of the images.",
        responses=problem_responses(*codes),
        openapi_extra={"requestBody": _FORM, **_OPEN},
    )
    async def predict(request: Request, response: Response, service: Authorised) -> Predictions:
        """Predicts all images or none; the first image that cannot be predicted determines the error."""
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
            raise Problem("busy", f"No response within {seconds}: try again later.") from None

    @app.get(
        "/v1/model",
        tags=["predict"],
        operation_id="model",
        summary="Describe the model",
        response_description="The model, its limits and its permitted use.",
        responses=problem_responses("unauthorized"),
        openapi_extra=_OPEN,
    )
    async def model(service: Authorised) -> ModelInfo:
        """Returns the model's classes, version, digests, calibration and limits."""
        return service.info


def _add_health(app: FastAPI) -> None:
    @app.get(
        "/health",
        tags=["health"],
        operation_id="health",
        summary="Report that the service responds",
        response_description="The service responds.",
    )
    async def health() -> Health:
        """Needs no token."""
        return Health(status="ok")

    @app.get(
        "/ready",
        tags=["health"],
        operation_id="ready",
        summary="Report whether the service predicts images",
        response_description="The service predicts images.",
        responses=problem_responses("busy"),
    )
    async def ready(service: Reachable) -> Health:
        """Needs no token."""
        if not service.batcher.ready:
            raise Problem("busy", "The service is starting or stopping.")
        return Health(status="ok")


def _complete(app: FastAPI) -> None:
    """Add the schema of errors to the document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document["components"]["schemas"]
        schemas["ProblemDetails"] = ProblemDetails.model_json_schema(mode="serialization")
        return document

    app.openapi = openapi  # type: ignore[method-assign]
