"""The service's endpoints and its OpenAPI document."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp

from fedsigma.client.serving.errors import (
    PROBLEMS,
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
_IMAGES = {
    "type": "array",
    "minItems": 1,
    "description": "PNG, JPEG, TIFF (first page) or DICOM files, by content; "
    "file names and declared types are ignored.",
    "items": {"type": "string", "format": "binary"},
}
_FORM_SCHEMA = {
    "type": "object",
    "required": [FIELD],
    "additionalProperties": False,
    "properties": {FIELD: _IMAGES},
}
_FORM: dict[str, Any] = {"schema": _FORM_SCHEMA, "encoding": {FIELD: {"contentType": ", ".join(MEDIA_TYPES)}}}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": _FORM}}}


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def _authorised(
    service: Annotated[Service, Depends(_service)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Service:
    if service.token is not None:
        token = credentials.credentials if credentials else ""
        if not hmac.compare_digest(token.encode(), service.token.encode()):
            raise Problem("unauthorized", "Send the header Authorization: Bearer TOKEN.")
    return service


Authorised = Annotated[Service, Depends(_authorised)]


router = APIRouter()


def create_app(service: Service | None = None) -> FastAPI:
    """Create the application; without a service it provides the OpenAPI document only."""

    @asynccontextmanager
    async def run_service(_: FastAPI) -> AsyncIterator[None]:
        assert service is not None
        service.batcher.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="FedSigma",
        version=__version__,
        summary="Predicts images with a study's trained model.",
        description=NOTICE,
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
        lifespan=run_service,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.service = service
    app.include_router(router)
    add_problem_handlers(app)
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schema = ProblemDetails.model_json_schema(mode="serialization")
        document["components"]["schemas"]["ProblemDetails"] = schema
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def asgi(service: Service) -> ASGIApp:
    """Create the application as a server runs it, which logs unexpected errors by their type only."""
    return RedactErrors(create_app(service))


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document, which is the same for every model."""
    return create_app().openapi()


@router.post(
    "/v1/predict",
    tags=["predict"],
    operation_id="predict",
    summary="Predict one or several images",
    response_description="One prediction an image, in the order of the images.",
    responses=problem_responses(*PROBLEMS),
    openapi_extra={**_BODY, **_OPEN},
)
async def _predict(request: Request, response: Response, service: Authorised) -> Predictions:
    """Predicts all images or none; the first image that cannot be predicted determines the error."""
    response.headers["Cache-Control"] = "no-store"
    contents: list[bytes] | None = None
    try:
        with service.admit(request.client.host if request.client else ""):
            async with asyncio.timeout(service.limits.timeout_s):
                contents = await read_images(request, service.limits)
                return await service.predict(contents)
    except TimeoutError:
        seconds = f"{service.limits.timeout_s:g} seconds"
        if contents is None:
            raise Problem("body-too-slow", f"The body did not arrive within {seconds}.") from None
        raise Problem("busy", f"No response within {seconds}: try again later.") from None


@router.get(
    "/v1/model",
    tags=["predict"],
    operation_id="model",
    summary="Describe the model",
    response_description="The model, its limits and its permitted use.",
    responses=problem_responses("unauthorized"),
    openapi_extra=_OPEN,
)
async def _model(service: Authorised) -> ModelInfo:
    """Returns the model's classes, version, digests, calibration and limits."""
    return service.info


@router.get(
    "/health",
    tags=["health"],
    operation_id="health",
    summary="Report that the service responds",
    response_description="The service responds.",
)
async def _health() -> Health:
    """Needs no token."""
    return Health(status="ok")


@router.get(
    "/ready",
    tags=["health"],
    operation_id="ready",
    summary="Report whether the service predicts images",
    response_description="The service predicts images.",
    responses=problem_responses("busy"),
)
async def _ready(service: Annotated[Service, Depends(_service)]) -> Health:
    """Needs no token."""
    if not service.batcher.ready:
        raise Problem("busy", "The service is starting or stopping.")
    return Health(status="ok")
