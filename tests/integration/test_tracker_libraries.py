"""The trackers' own libraries: a real MLflow server, TensorBoard's reader, W&B's file of an offline run."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.study import load_study
from fedsigma.common.ops.supervisor import free_ports
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.trackers import TrackerCallback, choose_trackers
from tests.unit.test_run_dir import STUDY as SMALL

HOSTILE = "Klinik am Süd/Tor <b>"


def write_round(folder: RunDir, number: int) -> None:
    for index, site in enumerate(("north", HOSTILE)):
        metrics = {"accuracy": 0.5 + number / 10 + index / 100, "loss": 1 / number, "epsilon": 0.25 * number}
        folder.log_round(number, site, metrics, 61_700, 58_200, "accepted")
    folder.log_round(number, ALL_SITES, {"accuracy": 0.5 + number / 10}, 0, 0, ALL_SITES)


def track(path: Path, names: str, *, rounds: tuple[int, ...], end: bool) -> RunDir:
    """A run, or its beginning, or what it goes on with."""
    study = load_study("demo")
    folder = RunDir.open(path) if path.exists() else RunDir.create(path, SMALL)
    following = TrackerCallback(folder, choose_trackers(names), study=study, run="7")
    folder.log_event("run_start", study="demo", run="7", resume=False)
    for number in rounds:
        write_round(folder, number)
    if end:
        folder.write_summary({"rounds": 2, "federated": {"accuracy": 0.75, "per_site": {"north": 0.5}}})
        folder.log_event("published", model="demo@1", folder="x")
        folder.log_event("run_end", ok=True, reason="")
        folder.report_path.write_text("<html></html>")
        (folder.path / "sigma.safetensors").write_bytes(b"sigma")
    following.close()
    return folder


def failures(folder: RunDir) -> list[tuple[str, str]]:
    return [(e["tracker"], e["error"]) for e in folder.events() if e["kind"] == "tracker_failed"]


# ---- MLflow


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed: the extra dev has it")
    pytest.importorskip("flask_cors", reason="an MLflow server needs flask-cors: the extra dev has it")
    place = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{place}/mlflow.db"]
    command += ["--artifacts-destination", str(place / "artefacts")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **quiet},
            cwd=place,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(url, process, place / "log")
        yield url
    finally:
        import psutil

        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(20)
        for one in children:
            if one.is_running():
                one.kill()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the MLflow server did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def mlflow_client(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    return mlflow.MlflowClient(mlflow_server)


def mlflow_runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("fedsigma")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def test_mlflow_has_the_run_and_resumes_it(tmp_path: Path, mlflow_client: Any) -> None:
    folder = track(tmp_path / "run", "mlflow+sigma", rounds=(1,), end=False)
    assert failures(folder) == []
    (begun,) = mlflow_runs(mlflow_client)
    assert begun.info.status == "KILLED" and begun.info.run_name == "run"
    track(folder.path, "", rounds=(2,), end=True)
    assert failures(folder) == []
    (done,) = mlflow_runs(mlflow_client)
    assert done.info.run_id == begun.info.run_id and done.info.status == "FINISHED"
    assert done.data.params["training.local_steps"] and done.data.params["name"] == "demo"
    assert done.data.tags["fedsigma.model"] == "demo@1" and done.data.tags["fedsigma.run"] == "7"
    told = mlflow_client.get_metric_history(done.info.run_id, "site/north/accuracy")
    assert [(one.step, one.value) for one in told] == [(1, 0.6), (2, 0.7)]
    sites = {name.split("/")[1] for name in done.data.metrics if name.startswith("site/")}
    assert len(sites) == 2 and done.data.metrics["final/federated/site/north"] == 0.5
    assert done.data.metrics["final/federated/accuracy"] == 0.75
    files = {one.path for one in mlflow_client.list_artifacts(done.info.run_id)}
    assert files == {"study.yaml", "report.html", "sigma.safetensors"}
    # Of this machine, MLflow knows nothing: no user, no program, no commit.
    assert not [name for name in done.data.tags if name.startswith("mlflow.source")]
    assert done.data.tags.get("mlflow.user", "unknown") == "unknown"


def test_refusing_tracker_server_is_logged_and_the_run_continues(
    tmp_path: Path, mlflow_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(mlflow_runs(mlflow_client))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = track(tmp_path / "run", "mlflow", rounds=(1, 2), end=True)
    assert failures(folder) == [("mlflow", "MlflowException")]
    assert len(folder.rounds()) == 6 and len(mlflow_runs(mlflow_client)) == before


HANGING = """
import sys
from pathlib import Path
from tests.integration.test_tracker_libraries import failures, track
from fedsigma.server.trackers import callback
callback.CLOSE_TIMEOUT_S = 0.5
folder = track(Path(sys.argv[1]), "mlflow", rounds=(1, 2), end=True)
print(failures(folder), len(folder.rounds()))
"""


def test_silent_tracker_server_does_not_block_exit(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed: the extra dev has it")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        here = {**os.environ, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        here["PYTHONPATH"] = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", HANGING, str(tmp_path / "run")]
        done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[('mlflow', 'TimeoutError')] 6"


# ---- TensorBoard


def test_tensorboard_reads_all_rounds_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the extra dev has it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("fedsigma.server.trackers.callback.CLOSE_TIMEOUT_S", 60.0)
    folder = track(tmp_path / "run", "tensorboard", rounds=(1,), end=False)
    track(folder.path, "", rounds=(2,), end=True)
    assert failures(folder) == []
    found = EventAccumulator(str(folder.path / "trackers" / "tensorboard"))
    found.Reload()
    told = {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert told["site/north/accuracy"] == [(1, pytest.approx(0.6)), (2, pytest.approx(0.7))]
    assert told["all_sites/accuracy"] == [(1, pytest.approx(0.6)), (2, pytest.approx(0.7))]
    assert told["site/north/bytes_up"] == [(1, 61_700), (2, 61_700)]
    assert told["final/federated/accuracy"] == [(0, 0.75)]
    tensors = {tag: found.Tensors(tag)[-1].tensor_proto for tag in found.Tags()["tensors"]}
    texts = {tag: tensor.string_val[0].decode() for tag, tensor in tensors.items()}
    assert "| training.local_steps | " in texts["parameters/text_summary"]
    assert texts["tags/model/text_summary"] == "demo@1"
    assert len(found.Tensors("parameters/text_summary")) == 1


# ---- Weights & Biases


def wandb_records(path: Path) -> list[Any]:
    """The records of a run file: LevelDB's log format, with a head of 7 bytes, of W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, block = path.read_bytes(), 32_768
    assert content.startswith(b":W&B")
    found, whole, at = [], b"", 7
    while at + 7 <= len(content):
        if block - at % block < 7:  # what is left of a block holds no head
            at += block - at % block
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunDir], list[Path]]:
    pytest.importorskip("wandb", reason="wandb is not installed: the extra dev has it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("fedsigma.server.trackers.callback.CLOSE_TIMEOUT_S", 60.0)
    import wandb

    def files(folder: RunDir) -> list[Path]:
        # The library writes the last of it when its own process ends, as it does at the end of a run's.
        wandb.teardown()
        return sorted((folder.path / "trackers").rglob("*.wandb"))

    return files


def test_wandb_writes_and_resumes_an_offline_run(tmp_path: Path, offline: Callable) -> None:
    folder = track(tmp_path / "run", "wandb", rounds=(1,), end=False)
    (first,) = offline(folder)
    time.sleep(1.1)  # the library names its folders by the second
    track(folder.path, "", rounds=(2,), end=True)
    assert failures(folder) == []
    (second,) = set(offline(folder)) - {first}
    records = [wandb_records(path) for path in (first, second)]
    ids = [record.run.run_id for one in records for record in one if record.HasField("run")]
    assert len(set(ids)) == 1
    told: dict[str, list[str]] = {}
    summary, saved = {}, set()
    for record in [*records[0], *records[1]]:
        for item in record.history.item:
            told.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = item.value_json
        saved |= {file.path for file in record.files.files}
    assert told["site/north/accuracy"] == ["0.6", "0.7"] and told["all_sites/accuracy"] == ["0.6", "0.7"]
    assert told["round"] == ["1"] * 3 + ["2"] * 3
    assert summary["final/federated/accuracy"] == "0.75" and {"study.yaml", "report.html"} <= saved


def test_wandb_keeps_nothing_of_the_machine(tmp_path: Path, offline: Callable) -> None:
    folder = track(tmp_path / "run", "wandb", rounds=(1,), end=True)
    (path,) = offline(folder)
    content = path.read_bytes()
    assert b"training.local_steps" in content and b"demo@1" in content
    for told in (str(tmp_path), f"{Path.home()}/", sys.argv[0], "numpy=="):
        assert told.encode() not in content, told
    records = wandb_records(path)
    assert {record.run.host for record in records} == {""} and not any(
        r.HasField("environment") for r in records
    )
    assert {one.name for one in (path.parent / "files").iterdir()} == {"study.yaml", "report.html"}
