"""Supervised processes: real ones, with a real supervisor."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedsigma.common.ops import supervisor as processes
from fedsigma.common.ops.supervisor import (
    Process,
    ProcessError,
    is_running,
    restart,
    states,
    stop,
    supervise,
)
from fedsigma.common.ops.supervisord import _BestEffortStream

SUPERVISE = """
import sys
from pathlib import Path
from fedsigma.common.ops.supervisor import Process, supervise
folder = Path(sys.argv[1])
code = "import os, time; open('seen', 'a').write(os.environ['WORD'] + chr(10)); time.sleep(600)"
word = {"WORD": "50% of 'it', yes"}
one = Process(name="one", command=[sys.executable, "-c", code], environment=word, after=1)
two = Process(name="two", command=[sys.executable, "-c", "import time; time.sleep(600)"], after=2)
supervise([one, two], folder)
"""


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.1)


def pid_of(folder: Path, name: str) -> int:
    return next(state.pid for state in states(folder) if state.name == name)


def all_run(folder: Path, *, but: int = 0) -> bool:
    """Whether all processes run, none of them as this process number."""
    if not is_running(folder):
        return False
    return all(state.state == "RUNNING" and state.pid != but for state in states(folder))


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: all_run(tmp_path))
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_crashed_processes_are_restarted_and_stopped_ones_leave_nothing(
    supervisor: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    first = pid_of(tmp_path, "one")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: all_run(tmp_path, but=first))
    second = pid_of(tmp_path, "one")
    restart(tmp_path, "one")
    wait_for(lambda: all_run(tmp_path, but=second))
    assert pid_of(tmp_path, "one") not in (first, second)
    wait_for(lambda: (tmp_path / "seen").read_text().splitlines() == ["50% of 'it', yes"] * 3)

    with pytest.raises(ProcessError, match="run already"):
        supervise([], tmp_path)
    with pytest.raises(ProcessError, match=r"the supervisor of .* reports"):
        restart(tmp_path, "three")

    left = [pid_of(tmp_path, name) for name in ("one", "two")]
    stop(tmp_path)
    assert supervisor.wait(timeout=60) == 0
    assert not any(psutil.pid_exists(pid) for pid in left) and not is_running(tmp_path)


def test_without_a_supervisor_there_is_nothing_to_ask(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    for call in (states, stop):
        with pytest.raises(ProcessError, match="start them with `up`"):
            call(tmp_path)


def test_missing_program_is_named(tmp_path: Path) -> None:
    missing = Process(name="x", command=["no-such-program"])
    for call in (lambda: supervise([missing], tmp_path), lambda: missing.replace_this(tmp_path)):
        with pytest.raises(ProcessError, match="'no-such-program' is not installed"):
            call()


def test_long_path_does_not_break_the_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 90)
    assert len(str(processes._socket(deep))) <= 100
    assert processes._socket(deep) != processes._socket(tmp_path / ("y" * 90))


@pytest.mark.parametrize("value", ['a"b', "'a", "a ;b", "a\t#b", "a\nb"])
def test_a_value_that_the_supervisor_would_read_otherwise_is_refused(value: str, tmp_path: Path) -> None:
    one = Process(name="one", command=[sys.executable], environment={"WORD": value})
    with pytest.raises(ProcessError, match="holds a"):
        supervise([one], tmp_path)


@pytest.mark.parametrize("value", ["a ;b", "a\t#b", "a\nb"])
def test_command_argument_that_would_be_cut_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="holds a comment or line break"):
        supervise([Process(name="one", command=[sys.executable, value])], tmp_path)


def test_the_supervisor_reads_the_commands_that_were_meant(tmp_path: Path) -> None:
    """By supervisord's own parser."""
    from supervisor.options import ServerOptions

    command = [sys.executable, "--node-config", 'site-name="a b"', "it's 50%", ""]
    (tmp_path / "logs").mkdir()
    file = tmp_path / "supervisord.conf"
    file.write_text(processes._configuration([Process(name="one", command=command)], tmp_path))
    options = ServerOptions()
    options.realize(["-c", str(file)])
    (group,) = options.process_group_configs
    (found,) = group.process_configs
    assert shlex.split(found.command) == command


def test_a_killed_supervisor_leaves_nobody_behind(
    supervisor: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    pids = [pid_of(tmp_path, name) for name in ("one", "two")]
    supervisor.kill()
    wait_for(lambda: all(ended(pid) for pid in pids))


def test_a_full_disk_under_its_output_does_not_end_a_supervisor(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        command = [sys.executable, "-c", SUPERVISE, str(tmp_path)]
        with subprocess.Popen(command, stdout=full, stderr=full) as process:
            try:
                wait_for(lambda: all_run(tmp_path))
                restart(tmp_path, "one")
                wait_for(lambda: all_run(tmp_path))
                assert process.poll() is None
            finally:
                process.terminate()


MASTER = """
import subprocess, time
worker = subprocess.Popen(["sleep", "60"])
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_proxy_whose_master_is_killed_leaves_no_worker_that_holds_its_port() -> None:
    command = [sys.executable, "-m", "fedsigma.server.deployment.proxy_process", sys.executable, "-c", MASTER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as whole:
        assert whole.stdout is not None
        worker = int(whole.stdout.readline())
        master = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(master, signal.SIGKILL)
        assert whole.wait(timeout=20) == 128 + signal.SIGKILL
    wait_for(lambda: ended(worker))


def test_a_killed_guard_takes_the_proxy_with_it() -> None:
    command = [sys.executable, "-m", "fedsigma.server.deployment.proxy_process", "sleep", "60"]
    with subprocess.Popen(command) as whole:
        children = Path(f"/proc/{whole.pid}/task/{whole.pid}/children")
        wait_for(lambda: children.read_text().split())
        child = int(children.read_text().split()[0])
        wait_for(lambda: b"sleep" in Path(f"/proc/{child}/cmdline").read_bytes())
        whole.kill()
        whole.wait(timeout=20)
    wait_for(lambda: ended(child))


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for nothing but that its end is noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


LINGERING = """
import sys, threading, time
from importlib.metadata import EntryPoint
from unittest import mock

def program():
    threading.Thread(target=time.sleep, args=(60,)).start()
    {last}

module = sys.modules["deaf"] = type(sys)("deaf")
module.program = program
from fedsigma.common.ops import flower_process
entry = EntryPoint("flower-deaf", "deaf:program", "console_scripts")
with mock.patch.object(flower_process, "entry_points", return_value=(entry,)):
    flower_process.main("flower-deaf")
"""


@pytest.mark.parametrize("last", ["return", "raise RuntimeError('no way on')"])
def test_flower_program_ends_although_one_of_its_threads_keeps_running(last: str) -> None:
    code = LINGERING.format(last=last)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "flower-deaf has ended" in done.stderr
    assert ("no way on" in done.stderr) == last.startswith("raise")


def test_what_programs_say_in_bytes_is_written_too() -> None:
    stream = io.StringIO()
    _BestEffortStream(stream).write("ein Gerät\n".encode() + b"\xff")
    assert stream.getvalue() == "ein Gerät\n\ufffd"
