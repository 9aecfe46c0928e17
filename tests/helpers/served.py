"""A service on a real uvicorn server on loopback, for tests."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from torch import Tensor

from fedsigma.client.inference.calibration import Calibration
from fedsigma.client.inference.loaded_model import LoadedModel
from fedsigma.client.inference.predictor import Predictor
from fedsigma.client.serving.app import asgi
from fedsigma.client.serving.limits import Limits
from fedsigma.client.serving.service import Service, describe_model
from fedsigma.common.ops.web import create_server, open_listener

PATIENT = "MUSTERMANN_19700101.png"


@dataclass
class Held:
    """A judge's computation that waits until it may go on, and notes how many images it is given."""

    judge: Predictor
    go: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    sizes: list[int] = field(default_factory=list)

    def __call__(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        self.entered.set()
        assert self.go.wait(20)
        return Predictor.probabilities(self.judge, images)


@contextmanager
def serving(
    restored: LoadedModel,
    run: Path,
    *,
    token: str | None = None,
    held: bool = False,
    calibration: Calibration | None = None,
    least: float = 0.0,
    **limits: Any,
) -> Iterator[tuple[httpx.Client, Service, Any]]:
    """A client of a service with this model, the service, and what holds its judge, if it is to be held."""
    bounds = Limits(**limits)
    judge = Predictor(
        restored, temperature=calibration.temperature if calibration else 1.0, abstain_below=least
    )
    holder = Held(judge) if held else None
    if holder:
        judge.probabilities = holder  # type: ignore[method-assign]
    service = Service(judge, describe_model(run, restored, calibration, least, bounds), bounds, token=token)
    web_server = create_server(asgi(service), grace_s=bounds.grace_s)
    with open_listener("127.0.0.1", 0) as place:
        thread = threading.Thread(target=web_server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{place.getsockname()[1]}", timeout=30) as client:
                yield client, service, holder
        finally:
            web_server.should_exit = True
            while thread.is_alive() and place.fileno() != -1:  # until it has stopped listening
                time.sleep(0.01)
            if holder:
                holder.go.set()
            thread.join(30)
            assert not thread.is_alive()


def picture(seed: int = 0, kind: str = "PNG", side: int = 40) -> bytes:
    """A picture of noise, as a file."""
    values = np.random.default_rng(seed).integers(0, 255, (side, side, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind)
    return stream.getvalue()


def post(client: httpx.Client, *contents: bytes, **more: Any) -> httpx.Response:
    """Send images, under a name that nobody may repeat."""
    files = [("images", (PATIENT, content)) for content in contents]
    return client.post("/v1/predict", files=files, **more)


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that an answer is this problem, and return its details."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), (
        answer.text
    )
    details = answer.json()
    assert details["code"] == code and details["status"] == status and details["type"] == "about:blank"
    assert "MUSTERMANN" not in answer.text and "Traceback" not in answer.text
    return details
