"""What a service refuses: too much, too large, too slow, no image, no token; said in words, not logged."""

from __future__ import annotations

import asyncio
import io
import logging
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit
from starlette.requests import Request

from fedsigma.client.inference.loaded_model import LoadedModel, ModelLoadError, load_model
from fedsigma.client.inference.predictor import Predictor
from fedsigma.client.serving.errors import Problem
from fedsigma.client.serving.images import decode_image
from fedsigma.client.serving.limits import Limits, ServeError, is_loopback, read_token
from fedsigma.client.serving.uploads import read_images
from tests.helpers.finished_run import make_run
from tests.helpers.served import PATIENT, picture, post, problem, serving
from tests.unit.test_batch_prediction import frames_of, noise
from tests.unit.test_data_dicom import make

PIXELS = 90_000
# Libraries that decode warn of damage, by which they quote it; the command turns that off.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def restored(run: Path) -> LoadedModel:
    loaded = load_model(run)
    loaded.sigma.merge()
    return loaded


@pytest.fixture(scope="module")
def client(run: Path, restored: LoadedModel) -> Iterator[httpx.Client]:
    with serving(restored, run, body_bytes=200_000, images=3, pixels=PIXELS) as (client, _, _):
        yield client


def dicom(dataset: Any) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def png_bomb(side: int) -> bytes:
    """A small file of an enormous picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tile_bomb() -> bytes:
    """A TIFF of few pixels in one enormous tile."""
    size, bits, compression, grey, tile_width, tile_length = (256, 257), 258, 259, 262, 322, 323
    values = {size[0]: 8, size[1]: 8, bits: 8, compression: 8, grey: 1, 277: 1}
    values |= {tile_width: 60_000, tile_length: 60_000, 324: 200, 325: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4)
    return head.ljust(200, b"\0") + zlib.compress(bytes(64)).ljust(50, b"\0")


def frames_bomb() -> bytes:
    dataset = make(noise(0))
    dataset.NumberOfFrames = 2_000_000_000
    return dicom(dataset)


def rows_bomb() -> bytes:
    dataset = make(noise(0))
    dataset.Rows = dataset.Columns = 60_000
    return dicom(dataset)


def nested_bomb() -> bytes:
    """A DICOM file that says it has few pixels, and holds a JPEG of many."""
    from pydicom.encaps import encapsulate

    stream = io.BytesIO()
    Image.new("L", (2000, 2000)).save(stream, "JPEG")
    dataset = make(np.zeros((8, 8), np.uint8))
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return dicom(dataset)


def deflated_bomb() -> bytes:
    dataset = make(np.zeros((8, 8), np.uint8))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.ImageComments = "0" * 60_000
    return dicom(dataset)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (lambda: png_bomb(60_000), 413, "too-many-pixels"),
        (lambda: png_bomb(301), 413, "too-many-pixels"),
        (tile_bomb, 413, "too-many-pixels"),
        (rows_bomb, 413, "too-many-pixels"),
        (frames_bomb, 413, "too-many-images"),
        (nested_bomb, 422, "unreadable-image"),
        (deflated_bomb, 422, "unreadable-image"),
        (lambda: picture()[:-2000], 422, "unreadable-image"),
        (lambda: picture(kind="JPEG")[:40], 422, "unreadable-image"),
        (lambda: dicom(make(noise(0)))[:600], 422, "unreadable-image"),
        (lambda: bytes(128) + b"DICM", 422, "unreadable-image"),
        (lambda: picture(kind="GIF"), 415, "not-an-image"),
        (lambda: b"<svg/>", 415, "not-an-image"),
        (lambda: b"", 415, "not-an-image"),
    ],
)
def test_invalid_or_too_large_image(client: httpx.Client, content: Any, status: int, code: str) -> None:
    details = problem(post(client, picture(), content()), status, code)
    assert details["image"] == 2 and "mage 2 " in details["detail"]


# Made once: pydicom numbers each file anew.
WHOLE = [picture(side=12), picture(0, "JPEG", 12), picture(0, "TIFF", 12), dicom(make(noise(0, 6)))]


@given(st.data())
def test_damaged_images_are_problems_and_nothing_else(restored: LoadedModel, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    limits = Limits(images=3, pixels=PIXELS, queue_size=3)
    try:
        frames = decode_image(bytes(content), restored.backbone, limits, 1)
    except Problem as error:
        assert error.image == 1
    else:
        side = restored.backbone.image_size
        assert all(image.shape == (3, side, side) for image in frames)


def test_the_format_is_detected_by_content(client: httpx.Client) -> None:
    answer = client.post("/v1/predict", files={"images": ("x.txt", picture(), "text/plain")})
    assert answer.status_code == 200


def test_without_pydicom_dicom_is_not_read(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    content = dicom(make(noise(0)))
    assert post(client, content).status_code == 200
    monkeypatch.setitem(sys.modules, "pydicom", None)
    details = problem(post(client, content), 415, "not-an-image")
    assert "DICOM" not in details["detail"]


def test_too_many_images_or_frames(client: httpx.Client) -> None:
    assert post(client, *[picture()] * 3).status_code == 200
    problem(post(client, *[picture()] * 4), 413, "too-many-images")
    two = dicom(frames_of(noise(0), noise(1)))
    problem(post(client, two, two), 413, "too-many-images")


def test_body_size_is_measured_not_trusted_from_its_header(client: httpx.Client) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    start = b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\n'
    many = (start, *[b"0" * 10_000] * 50)
    problem(client.post("/v1/predict", content=iter(many), headers=kind), 413, "body-too-large")
    taken = []

    async def receive() -> Any:
        taken.append(1)
        body = b"0" * 10_000 if len(taken) > 1 else start
        return {"type": "http.request", "body": body, "more_body": True}

    headers = [(b"content-type", kind["Content-Type"].encode())]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    with pytest.raises(Problem, match="at most 200000 bytes"):
        asyncio.run(read_images(request, Limits(body_bytes=200_000)))
    assert len(taken) == 21
    # Refused by what it says alone, before anything is sent.
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as raw:
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind['Content-Type']}\r\n"
        raw.sendall(head.encode() + b"Content-Length: 200001\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        ("application/json", b"{}", 415, "not-a-form"),
        ("image/png", b"x", 415, "not-a-form"),
        ("multipart/form-data", b"x", 400, "malformed"),
        ("multipart/form-data; boundary=x", b"", 400, "malformed"),
        ("multipart/form-data; boundary=x", b"no boundary", 400, "malformed"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400, "malformed"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="other"\r\n\r\ny\r\n--x--\r\n',
            400,
            "malformed",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\ncut off',
            400,
            "malformed",
        ),
        ("multipart/form-data; boundary=x", b"--x\r\nNo-Name: 1\r\n\r\ny\r\n--x--\r\n", 400, "malformed"),
    ],
)
def test_body_that_is_not_a_form_is_refused(
    client: httpx.Client, kind: str, body: bytes, status: int, code: str
) -> None:
    problem(client.post("/v1/predict", content=body, headers={"Content-Type": kind}), status, code)


def test_a_token_is_checked_before_the_body_is_read(run: Path, restored: LoadedModel) -> None:
    with serving(restored, run, token="0123456789abcdef") as (client, _, _):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic MDEyMzQ1Njc4OWFiY2RlZg=="},
        ):
            for answer in (client.get("/v1/model", headers=headers), post(client, b"x", headers=headers)):
                problem(answer, 401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer 0123456789abcdef"}
        assert client.get("/v1/model", headers=right).status_code == 200
        assert post(client, picture(), headers=right).status_code == 200
        assert client.get("/health").status_code == client.get("/openapi.json").status_code == 200


def test_full_queue_answers_with_retry_after(run: Path, restored: LoadedModel) -> None:
    with (
        serving(restored, run, held=True, images=2, queue_size=2) as (client, service, held),
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(post, client, picture())
        assert held.entered.wait(20)
        second = pool.submit(post, client, picture(), picture())
        while len(service.batcher._queue) < 2:
            time.sleep(0.01)
        answer = post(client, picture())
        problem(answer, 503, "busy")
        assert int(answer.headers["retry-after"]) >= 1
        held.go.set()
        assert first.result().status_code == second.result().status_code == 200
        assert post(client, picture()).status_code == 200


@pytest.mark.parametrize(
    ("limits", "status", "code"),
    [({"per_client": 1}, 429, "too-many-requests"), ({"requests": 1, "per_client": 1}, 503, "busy")],
)
def test_requests_under_way_are_counted(
    run: Path, restored: LoadedModel, limits: dict[str, int], status: int, code: str
) -> None:
    with serving(restored, run, held=True, **limits) as (client, _, held), ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, client, picture())
        assert held.entered.wait(20)
        answer = post(client, picture())
        problem(answer, status, code)
        assert int(answer.headers["retry-after"]) >= 1
        held.go.set()
        assert first.result().status_code == 200
        assert post(client, picture()).status_code == 200


def test_slow_download_times_out(run: Path, restored: LoadedModel) -> None:
    with serving(restored, run, held=True, timeout_s=0.3) as (client, _, _):
        problem(post(client, picture()), 503, "busy")
        waiting = threading.Event()

        def slow() -> Iterator[bytes]:
            yield b"--x\r\n"
            waiting.wait(2)

        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        problem(client.post("/v1/predict", content=slow(), headers=kind), 408, "body-too-slow")


def test_nothing_of_a_request_is_logged(
    run: Path, restored: LoadedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "PIL", "pydicom", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)

    def fails(*_: object) -> None:
        raise RuntimeError(f"cannot judge {PATIENT}")

    with serving(restored, run) as (client, service, _):
        assert post(client, picture()).status_code == 200
        problem(post(client, picture()[:100]), 422, "unreadable-image")
        monkeypatch.setattr(service.batcher, "_compute", fails)
        problem(post(client, picture()), 500, "failed")
        problem(client.get(f"/{PATIENT}"), 404, "not-found")
        assert client.delete("/v1/predict").headers["allow"] == "POST"
    assert "unexpected RuntimeError" in caplog.text
    assert "MUSTERMANN" not in caplog.text and "Traceback" not in caplog.text
    assert "predict" not in caplog.text


def test_a_model_that_has_diverged_is_a_fault(run: Path) -> None:
    broken = load_model(run)
    with torch.no_grad():
        for parameter in broken.sigma.merge().parameters():
            parameter.fill_(float("nan"))
    side = broken.backbone.image_size
    with pytest.raises(ModelLoadError, match="the probabilities are not finite"):
        Predictor(broken).probabilities(torch.zeros(1, 3, side, side, dtype=torch.uint8))


def test_settings(tmp_path: Path) -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""))
    with pytest.raises(ServeError, match="the limit pixels is 0"):
        Limits(pixels=0)
    with pytest.raises(ServeError, match="expected a queue_size"):
        Limits(images=9, queue_size=8)
    for bad in ("", "a" * 15, "a" * 16 + " b", "ä" * 16):
        (tmp_path / "token").write_text(bad)
        with pytest.raises(ServeError, match="16 visible ASCII"):
            read_token(tmp_path / "token")
