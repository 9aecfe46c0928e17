"""The command `fedsigma serve`: predictions over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedsigma.client.serving.limits import Limits
    from fedsigma.client.serving.service import Service

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)


@app.command()
def serve(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="A run folder, a sigma.safetensors, or NAME@N."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 chooses a free port.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that requests must send.", exists=True)
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Accept requests without a token from any machine.")
    ] = False,
    certificate: Annotated[
        Path | None, typer.Option(help="For TLS: PEM file of the certificate chain.", exists=True)
    ] = None,
    key: Annotated[Path | None, typer.Option(help="For TLS: PEM file of the key.", exists=True)] = None,
    backbone: Annotated[
        str | None, typer.Option(help="The study's backbone on this machine, such as local-dir:DIR.")
    ] = None,
    personal: Annotated[
        Path | None, typer.Option(help="File of the site's personal values, for a study that has them.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration file written by `fedsigma calibrate`.", exists=True)
    ] = None,
    abstain_below: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Predict no class below this probability.")
    ] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Most images in one batch.")] = 32,
    wait_ms: Annotated[float, typer.Option(min=0, help="Milliseconds that a batch waits for images.")] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="Most images waiting in the queue.")] = 256,
    max_images: Annotated[int, typer.Option(min=1, help="Most images of one request.")] = 64,
    max_mb: Annotated[float, typer.Option(min=0.001, help="Most megabytes of one request.")] = 32.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Most megapixels of one image.")] = 25.0,
    max_requests: Annotated[int, typer.Option(min=1, help="Most concurrent requests.")] = 32,
    per_client: Annotated[int, typer.Option(min=1, help="Most concurrent requests of one address.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request times out.")] = 60.0,
    openapi: Annotated[
        Path | None, typer.Option(help="Write the OpenAPI document to this file and exit.")
    ] = None,
) -> None:
    """Serve predictions of a trained model over HTTP, until Ctrl-C or SIGTERM. Research use only.

    POST /v1/predict predicts images (PNG, JPEG, TIFF, DICOM), GET /v1/model describes the model, /health and
    /ready report the service's state, /openapi.json documents the API. Requests are not logged.
    docs/serve.md has the details.

    Exit codes: 0 stopped, 3 the model, address, token or certificate cannot be used.

    Example: fedsigma serve white-cells@3 --token-file token
    """
    _need_extra()
    if openapi is not None:
        _write_document(openapi)
        return
    if model is None:
        raise typer.BadParameter("name a MODEL, or --openapi FILE")
    from fedsigma.client.serving.app import asgi
    from fedsigma.client.serving.images import restrict_decoders
    from fedsigma.client.serving.limits import Limits, check_exposure, read_token
    from fedsigma.common.ops.web import check_tls, create_server, open_listener, serve_until_stopped

    limits = Limits(
        body_bytes=int(max_mb * 1e6),
        images=max_images,
        pixels=int(max_megapixels * 1e6),
        requests=max_requests,
        per_client=per_client,
        queue_size=queue,
        batch_size=batch_size,
        wait_s=wait_ms / 1000,
        timeout_s=timeout,
    )
    token = read_token(token_file) if token_file else None
    check_exposure(host, token=token is not None, open_to_all=open_to_all)
    check_tls(certificate, key)
    restrict_decoders(limits.pixels)
    service = _service(model, backbone, personal, calibration, abstain_below, limits, token)
    with open_listener(host, port, remedy="choose a free one with --host and --port") as listener:
        scheme, name = "https" if certificate else "http", f"[{host}]" if ":" in host else host
        address = f"{scheme}://{name}:{listener.getsockname()[1]}"
        serve_until_stopped(
            create_server(asgi(service), grace_s=limits.grace_s, certificate=certificate, key=key),
            listener,
            lambda: typer.echo(f"Serving {service.info.model} on {address}. {service.info.notice}"),
        )
    typer.echo("Stopped.")


def _service(
    model: Path,
    backbone: str | None,
    personal: Path | None,
    calibration: Path | None,
    abstain_below: float,
    limits: Limits,
    token: str | None,
) -> Service:
    from fedsigma.client.inference.calibration import Calibration
    from fedsigma.client.inference.loaded_model import load_model
    from fedsigma.client.inference.predictor import Predictor
    from fedsigma.client.serving.service import Service, describe_model

    loaded = load_model(model, backbone, personal)
    fitted = Calibration.load_for(loaded, calibration)
    info = describe_model(model, loaded, fitted, abstain_below, limits)
    loaded.sigma.merge()
    temperature = fitted.temperature if fitted else 1.0
    predictor = Predictor(loaded, temperature=temperature, abstain_below=abstain_below)
    return Service(predictor, info, limits, token=token)


def _write_document(path: Path) -> None:
    from fedsigma.client.serving.app import openapi_document
    from fedsigma.common.utils.files import write_atomic

    write_atomic(path, (json.dumps(openapi_document(), indent=2) + "\n").encode())
    typer.echo(f"Wrote {path}.")


def _need_extra() -> None:
    from importlib.util import find_spec

    from fedsigma.client.serving.limits import ServeError

    missing = [name for name in ("fastapi", "uvicorn", "python_multipart") if find_spec(name) is None]
    if missing:
        raise ServeError(f"{', '.join(missing)} is not installed: pip install 'fedsigma[serve]'")
