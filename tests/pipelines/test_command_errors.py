"""What a command leaves behind when it fails or is told to end: one screen, an exit code, a traceback for bugs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.stages.train.launch import _causes

RAISING = """
import errno
from data.errors import DataError
from pipelines.cli import app as module
from pipelines.errors import *

def boom() -> None:
    raise {error}

module.app.command(name="boom")(boom)
import sys
sys.argv = ["bmojo", "boom"]
module.main()
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("UserError('give another file')", 1, "error: give another file"),
        ("ConfigError('x.yaml:3: no')", 1, "error: x.yaml:3: no"),
        ("DataError('line 2: not JSON')", 1, "error: line 2: not JSON"),
        ("InfrastructureError('the store is away')", 75, "error: the store is away"),
        ("OSError(errno.ENOSPC, 'No space left on device', '/disk/x')", 75, "/disk/x: No space left on device"),
        ("OSError(errno.EIO, 'Input/output error', '/disk/x')", 75, "/disk/x: Input/output error"),
        ("PermissionError(errno.EACCES, 'Permission denied', '/x')", 1, "/x: Permission denied"),
        ("KeyboardInterrupt", 130, ""),
        ("ZeroDivisionError('division by zero')", 70, "error: ZeroDivisionError: division by zero"),
        ("RecursionError('too deep')", 70, "error: RecursionError: too deep"),
    ],
)
def test_every_error_is_one_screen_and_the_exit_code_of_its_kind(
    tmp_path: Path, error: str, code: int, words: str
) -> None:
    ended = run("-c", RAISING.format(error=error), XDG_STATE_HOME=str(tmp_path))
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 5
    assert bool(list(tmp_path.rglob("*.txt"))) == (code == 70)


def test_a_bugs_traceback_is_saved_where_the_screen_says_without_secrets(tmp_path: Path) -> None:
    code = RAISING.format(error="RuntimeError('token is tell-nobody-this')")
    ended = run("-c", code, XDG_STATE_HOME=str(tmp_path), SOME_PASSWORD="tell-nobody-this")
    (file,) = (tmp_path / "bmojo/errors").iterdir()
    assert str(file) in ended.stderr
    assert "Traceback" in file.read_text()
    assert "RuntimeError: token is ***" in file.read_text()
    assert "tell-nobody-this" not in ended.stderr + file.read_text()


def test_a_traceback_finds_a_place_though_the_home_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = run(
        "-c", RAISING.format(error="RuntimeError('x')"), XDG_STATE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path)
    )
    assert ended.returncode == 70
    assert list(tmp_path.glob("errors/*.txt"))


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("-m", "pipelines", "plan").returncode == 2
    assert run("-m", "pipelines", "no-such-command").returncode == 2


def test_a_store_out_of_reach_is_one_screen_and_75(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening
        ended = run(
            *("-m", "pipelines", "list", "--storage", "s3://bucket/prefix"),
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{unused.getsockname()[1]}",
            AWS_ACCESS_KEY_ID="x",
            AWS_SECRET_ACCESS_KEY="not-a-secret",
            BMOJO_STORAGE_RETRY_S="1",
            BMOJO_CACHE_DIR=str(tmp_path),
        )
    assert ended.returncode == 75, ended.stderr
    assert "Cannot list s3://bucket/prefix/runs" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 3


def handles_sigterm(process: subprocess.Popen[str]) -> bool:
    """Whether the process has a handler of its own for SIGTERM by now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.3])
def test_a_signal_during_the_imports_ends_the_command_at_once(number: int, code: int, delay_s: float) -> None:
    command = [sys.executable, "-m", "pipelines", "doctor"]  # imports much and waits for processes of its own
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not handles_sigterm(process):
        time.sleep(0.001)
    time.sleep(delay_s)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == code, output
    assert output == "", "it went on after the signal"
    assert not psutil.pid_exists(process.pid)


STUBBORN = """
import sys, time
from pipelines.engine import interrupts
interrupts.handle_signals()
interrupts.GRACE_S, interrupts.SAME_S = map(float, sys.argv[1:])
try:
    print("ready", flush=True)
    time.sleep(3600)
finally:
    print("unwinding", flush=True)
    time.sleep(3600)  # a cluster that does not answer
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("again", [True, False])
def test_a_second_signal_or_the_end_of_the_grace_ends_what_will_not_end(number: int, code: int, again: bool) -> None:
    command = [sys.executable, "-c", STUBBORN, "3600" if again else "1", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "unwinding\n"
    if again:
        process.send_signal(number)
    assert process.wait() == code


def test_a_signal_that_comes_twice_at_once_is_one_request() -> None:
    command = [sys.executable, "-c", STUBBORN, "1", "3600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "unwinding\n"
    process.send_signal(signal.SIGINT)  # with code 130, were it not ignored
    assert process.wait() == 75


# ---- errors of Ray


def test_errors_in_ray_train_are_found_whatever_holds_them() -> None:
    from ray.exceptions import NodeDiedError, RayTaskError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    user, infrastructure = UserError("u"), InfrastructureError("i")
    task = RayTaskError("f", "traceback", infrastructure)
    assert _causes(WorkerGroupError("", {0: user, 1: task})) == [user, infrastructure]
    assert _causes(ControllerError(user)) == [user]
    died = NodeDiedError("gone")
    assert _causes(died) == [died]
