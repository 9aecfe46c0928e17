"""Inference by HTTP: what it answers is what `predict` writes, in batches, by its own document."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import load_all_checks
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.client.inference.batch import predict_folder
from fedsigma.client.inference.calibration import Calibration
from fedsigma.client.inference.loaded_model import LoadedModel, load_model
from fedsigma.server.deployment.certificates import create_authority, issue_certificate
from tests.helpers.finished_run import CLASSES, make_run
from tests.helpers.served import picture, post, serving
from tests.unit.test_batch_prediction import frames_of, noise, save
from tests.unit.test_data_dicom import make

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"
# The processor may compute in bfloat16, whose sums depend on the size of the batch.
ROUNDING = 1e-3


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
    with serving(restored, run) as (client, _, _):
        yield client


def test_responses_equal_those_of_predict(run: Path, restored: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.tif", "TIFF")):
        (folder / name).write_bytes(picture(ord(name[0]), kind, side=150))
    Image.fromarray(noise(7)).save(folder / "d.tiff")
    save(make(noise(8), WindowCenter=2000, WindowWidth=3000), folder / "e.dcm")
    save(frames_of(noise(9), noise(10)), folder / "f.dcm")
    calibration = Calibration(0.2, 30, 0.2, 0.1, "s", 2)
    assert predict_folder(restored, folder, tmp_path / "x.csv", temperature=0.2, abstain_below=0.6) == []
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    contents = [(folder / row["file"]).read_bytes() for row in rows]
    with serving(restored, run, calibration=calibration, least=0.6) as (client, _, _):
        answer = post(client, *contents)
        assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
        results = answer.json()["results"]
        info = client.get("/v1/model").json()
    for number, (row, result) in enumerate(zip(rows, results, strict=True), 1):
        assert result["image"] == number and list(result["probabilities"]) == list(CLASSES)
        expected = [float(row[f"probability_{name}"]) for name in CLASSES]
        np.testing.assert_allclose(list(result["probabilities"].values()), expected, atol=5 * ROUNDING)
        if abs(max(expected) - 0.6) > 0.02:
            assert (result["prediction"] or "") == row["prediction"]
    assert [result["frames"] for result in results] == [1, 1, 1, 1, 1, 2]
    assert None in [result["prediction"] for result in results]
    assert info["calibration"] == {"temperature": 0.2, "images": 30, "before": 0.2, "after": 0.1}
    assert info["abstain_below"] == 0.6


def test_the_served_model_is_described(client: httpx.Client, run: Path) -> None:
    info = client.get("/v1/model").json()
    assert info["classes"] == list(CLASSES)
    assert (info["model"], info["round"], info["backbone"], info["calibration"]) == ("s", 2, "starter", None)
    assert info["digest"] == hashlib.sha256((run / "sigma.safetensors").read_bytes()).hexdigest()
    assert "not for clinical use" in info["notice"] and info["limits"]["images"] == 64
    assert client.get("/health").json() == client.get("/ready").json() == {"status": "ok"}


def test_concurrent_requests_share_a_batch(run: Path, restored: LoadedModel) -> None:
    with (
        serving(restored, run, held=True, batch_size=4) as (client, service, held),
        ThreadPoolExecutor(6) as pool,
    ):
        first = pool.submit(post, client, picture(0))
        assert held.entered.wait(20)
        others = [pool.submit(post, client, picture(seed)) for seed in range(1, 6)]
        while len(service.batcher._queue) < 5:
            pass
        held.go.set()
        together = [response.result().json()["results"][0] for response in (first, *others)]
        alone = [post(client, picture(seed)).json()["results"][0] for seed in range(6)]
    assert held.sizes[:3] == [1, 4, 1]
    for response, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(
            list(response["probabilities"].values()), list(other["probabilities"].values()), atol=ROUNDING
        )
    assert len({json.dumps(response["probabilities"]) for response in alone}) == 6


def test_stopping_answers_what_is_under_way(run: Path, restored: LoadedModel) -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving(restored, run, held=True) as (client, service, held):
            own = httpx.Client(base_url=client.base_url, timeout=30)
            answer = pool.submit(post, own, picture())
            assert held.entered.wait(20)
            # Leaving the block tells the server to stop and, when it listens no more, lets the judge go on.
        assert answer.result().status_code == 200
        assert not service.batcher.ready
        with pytest.raises(httpx.ConnectError):
            own.get("/health")
        own.close()


def test_the_document_in_the_repository_is_the_one_that_is_served(client: httpx.Client) -> None:
    committed = json.loads(DOCUMENT.read_text())
    assert client.get("/openapi.json").json() == committed, "fedsigma serve --openapi docs/openapi.json"
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    responses = committed["paths"]["/v1/predict"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "408", "413", "415", "422", "429", "500", "503"}


load_all_checks()
schemathesis.openapi.media_type(
    "image/png", st.integers(0, 3).map(picture), aliases=["image/jpeg", "image/tiff", "application/dicom"]
)


@schemathesis.openapi.from_path(DOCUMENT).parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_does_what_its_document_says(case: schemathesis.Case, client: httpx.Client) -> None:
    case.call_and_validate(base_url=str(client.base_url))


# The command


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["serve", *map(str, words)])
    return done.exit_code, done.output


def certificate(folder: Path) -> tuple[Path, Path, Path]:
    authority = create_authority("test")
    (folder / "ca.crt").write_bytes(authority.certificate)
    issue_certificate(authority, ["127.0.0.1"]).write(folder / "x.crt", folder / "x.key")
    return folder / "ca.crt", folder / "x.crt", folder / "x.key"


def odd_dicom() -> bytes:
    """A file of which pydicom complains, quoting what is in it."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(noise(0), SeriesInstanceUID="MUSTERMANN").save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def test_the_command_serves_with_tls_and_a_token_and_ends_with_0(run: Path, tmp_path: Path) -> None:
    ca, chain, key = certificate(tmp_path)
    (tmp_path / "token").write_text("0123456789abcdef\n")
    words = ["--token-file", tmp_path / "token", "--certificate", chain, "--key", key, "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from fedsigma.cli.main import main; main()", "serve", run, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.fullmatch(r"Serving s on (https://127\.0\.0\.1:\d+)\. For research, .*\n", line)
        assert address, line
        trusted = ssl.create_default_context(cafile=str(ca))
        with httpx.Client(base_url=address[1], verify=trusted, timeout=30) as client:
            assert post(client, picture()).status_code == 401
            client.headers["Authorization"] = "Bearer 0123456789abcdef"
            assert post(client, picture(), odd_dicom()).status_code == 200
            assert post(client, odd_dicom()[:-100], picture()[:300]).status_code == 422
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "Stopped.\n", "")


def test_the_command_refuses_what_is_not_safe_or_cannot_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short").write_text("secret")
    _, chain, key = certificate(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [
            ([run, "--host", "0.0.0.0"], "can be reached from other machines"),
            ([run, "--host", "example.org"], "can be reached from other machines"),
            ([run, "--token-file", tmp_path / "short"], "at least 16 visible ASCII characters"),
            ([run, "--certificate", chain], "TLS needs both"),
            ([run, "--certificate", key, "--key", chain], "cannot be used"),
            ([run, "--queue", "10"], "expected a queue_size"),
            ([run, "--port", taken.getsockname()[1]], "cannot listen on 127.0.0.1"),
            (["nowhere"], "no sigma file"),
        ]
        for words, message in cases:
            code, text = call(*words)
            assert code == 3 and message in text, (words, text)
    assert call()[0] == 2
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, text = call(run)
    assert code == 3 and "uvicorn is not installed: pip install 'fedsigma[serve]'" in text


def test_the_command_writes_the_document(tmp_path: Path) -> None:
    code, _ = call("--openapi", tmp_path / "x.json")
    assert code == 0 and (tmp_path / "x.json").read_bytes() == DOCUMENT.read_bytes()
