"""Run a study as a simulation on this machine, by Flower's `flwr run`.

`flwr run` leaves a SuperLink running, installs the app's dependencies into a separate environment, starts two
sites by default, and exits with 0 even if the run failed. Here each simulation has its own SuperLink, ports
and home folder, which are removed afterwards, and the status of the run sets the exit code.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import load_study
from fedsigma.common.data.sources import site_data
from fedsigma.common.ops import flower_compat
from fedsigma.common.ops.supervisor import flower_environment, free_ports
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.server.evaluation.model_versions import find_version
from fedsigma.server.runs.run_dir import check_free
from fedsigma.server.runs.summary import runs_folder
from fedsigma.server.simulation.app_bundle import write_app
from fedsigma.server.trackers import choose_trackers

__all__ = ["SimulationError", "run_simulation"]

COMPLETED = "finished:completed"
START_S = 120.0
"""Time for the SuperLink to start, in seconds; a busy machine needs longer than Flower itself waits."""


class SimulationError(FedSigmaError, RuntimeError):
    """Flower could not start the simulation."""


def run_simulation(
    study: str,
    *,
    out: Path | None = None,
    rounds: int = 0,
    seed: int = -1,
    resume: bool = False,
    cpus_per_site: int = 1,
    trackers: str = "",
) -> int:
    """Run a study with all its sites on this machine, and show Flower's log.

    Args:
        study: Name of a built-in study, or path of a study file.
        out: The run folder; None creates one in `runs_folder()`.
        rounds: Replaces the study's rounds, unless 0.
        seed: Replaces the study's seed, unless -1.
        resume: Resume the interrupted run in `out`.
        cpus_per_site: CPU cores for each site; as many sites work at once as there are cores for.
        trackers: Comma-separated experiment trackers, besides those of $FEDSIGMA_TRACKERS.

    Returns:
        0 if the run completed, else 1.

    Raises:
        ConfigError: The study is invalid or has no data for a simulation, or a tracker cannot be used.
        ModelError: A version to evaluate does not exist.
        RunDirError: `out` is in use, or is a file.
        SimulationError: Flower did not start.
        KeyboardInterrupt: On Ctrl-C or SIGTERM; no process is left running, and the run can be resumed.
    """
    config = load_study(study)
    if config.data is None:
        raise ConfigError(
            f"study '{config.name}' has no data section, which a simulation needs: add one, or"
            " submit the study to a server"
        )
    sites = len(site_data.simulated_sites(config.data, config.classes, config.seed)[1])
    choose_trackers(trackers)
    run_folder = out.expanduser().resolve() if out else None
    if run_folder and not resume:
        check_free(run_folder)
    for reference in config.evaluate_versions:
        find_version(reference, run_folder.parent if run_folder else runs_folder())
    with _ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="fedsigma-") as folder:
        home = Path(folder)
        (home / "study.yaml").write_text(config.to_yaml(), encoding="utf-8")
        values = {"study": str(home / "study.yaml"), "resume": resume, "rounds": rounds, "seed": seed}
        values |= {"out": str(run_folder or ""), "trackers": trackers}
        api, control = map(str, free_ports(2))
        # It includes PYTHONUNBUFFERED, without which the log of a run would appear in blocks, with delay.
        environment = {
            **os.environ,
            **flower_environment(home / "flwr"),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": api,
            "FLWR_LOCAL_CONTROL_API_PORT": control,
        }
        with _superlink(home, environment, api, control):
            run = _flwr_run(home, environment, values, sites=sites, cpus=cpus_per_site)
            status = _status(run, api)
    if status != COMPLETED:
        print(f"FedSigma: the run ended as {status}: see its log above and events.jsonl", file=sys.stderr)
    return 0 if status == COMPLETED else 1


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end a simulation as Ctrl-C does, so that no SuperLink is left running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _superlink(home: Path, environment: dict[str, str], port: str, control: str) -> Iterator[None]:
    """Run a SuperLink as `flwr run` would start it, and end it with all its children."""
    log = home / "superlink.log"
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--control-api-address", f"127.0.0.1:{control}", "--host", "127.0.0.1", "--port", port]
    command += ["--database", str(home / "state.db")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=home, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_healthy(process, port, log)
        yield
    finally:
        _end(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:  # also of another status than 200
            time.sleep(0.2)
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise SimulationError(f"flower-superlink did not start within {START_S:g} s:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and all processes that it started.

    Flower starts its children in separate sessions, so a signal to one process group does not reach all of
    them; and once the parent has ended, they can no longer be found as its children.
    """
    import psutil

    alive = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        alive = [parent, *parent.children(recursive=True)]
    for end, patience in ((psutil.Process.terminate, 10.0), (psutil.Process.kill, 5.0)):
        for child in alive:
            with suppress(psutil.NoSuchProcess):
                end(child)
        alive = psutil.wait_procs(alive, timeout=patience)[1]
    process.wait()


def _flwr_run(
    home: Path, environment: dict[str, str], values: dict[str, object], *, sites: int, cpus: int
) -> str:
    """Start the run, show its log until it ends, and return its id."""
    # A checkout runs its own code; an installed package has no app beside it.
    checkout = Path(__file__).resolve().parents[2]
    is_checkout = all((checkout / name).is_file() for name in ("pyproject.toml", "fedsigma/serverapp.py"))
    app = checkout if is_checkout else write_app(home / "app")
    # JSON's strings, numbers and booleans are valid TOML.
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    federation = f"num-supernodes={sites} client-resources-num-cpus={cpus} client-resources-num-gpus=0"
    command = ["flwr", "run", str(app), "--stream", "--run-config", config]
    command += ["--federation-config", federation]
    lines: list[str] = []
    with subprocess.Popen(
        command, env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        except KeyboardInterrupt:
            process.terminate()
            raise
    match = re.search(r"run[ _-]?(?:id)?[^0-9]{0,4}(\d{6,})", "".join(lines), re.IGNORECASE)
    if match is None:
        raise SimulationError("`flwr run` did not start the run: see its message above")
    return match.group(1)


def _status(run: str, port: str) -> str:
    """Return the final status of the run; the log may end a moment before the run does."""
    client = flower_compat.ControlHttpClient.from_server_address(f"127.0.0.1:{port}", True, None, ())
    status = "unknown"
    with closing(client):
        for _ in range(30):
            with suppress(httpx.HTTPError):
                status = flower_compat.list_runs(client).get(run, "unknown")
            if status.startswith("finished"):
                break
            time.sleep(1)
    return status
