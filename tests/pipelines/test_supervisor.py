"""The process that starts a scheduler again: when it does, when it does not, and what it passes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.pipelines.waiting import wait_until

# The scheduler of these tests: at its n-th start it does what the n-th argument says.
SCHEDULER = """
import os, signal, sys, time
from pathlib import Path
from pipelines import supervisor
from pipelines.engine.interrupts import handle_signals

handle_signals()
supervisor.FIRST_PAUSE_S = 0.001
folder = Path(sys.argv[1])
progress = supervisor.supervise(int(sys.argv[2]), lambda text: print(text, flush=True))
num_starts = len(list(folder.iterdir()))
(folder / str(os.getpid())).touch()
for word in sys.argv[3 + num_starts].split():
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "wait":
        print("waiting", flush=True)
        time.sleep(3600)
    elif word.startswith("step"):
        progress.tell("train", int(word.removeprefix("step")))
    else:
        sys.exit(int(word))
"""


def start(folder: Path, restarts: int, *plan: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCHEDULER, str(folder), str(restarts), *plan]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(folder: Path, restarts: int, *plan: str) -> tuple[int, int, str]:
    """Exit code, number of starts, output."""
    process = start(folder, restarts, *plan)
    output, _ = process.communicate()
    return process.returncode, len(list(folder.iterdir())), output


def test_a_scheduler_that_is_killed_or_exits_with_75_is_started_again(tmp_path: Path) -> None:
    code, starts, output = ended(tmp_path, 5, "kill", "75", "0")
    assert (code, starts) == (0, 3)
    assert "was killed by SIGKILL. It starts again in 0 s (restart 1 of 5)." in output
    assert "ended with exit code 75. It starts again in 0 s (restart 2 of 5)." in output


@pytest.mark.parametrize("code", [0, 1, 70, 130])
def test_success_errors_and_cancelling_are_final(tmp_path: Path, code: int) -> None:
    assert ended(tmp_path, 5, str(code)) == (code, 1, "")


def test_it_gives_up_after_that_many_restarts_without_progress(tmp_path: Path) -> None:
    code, starts, output = ended(tmp_path, 2, "kill", "kill", "kill", "0")
    assert (code, starts) == (75, 3)
    assert "3 times without progress. It is not started again." in output


def test_restarts_are_counted_anew_when_a_stage_got_further(tmp_path: Path) -> None:
    code, starts, _ = ended(tmp_path, 1, "step1 kill", "step2 kill", "step3 kill", "0")
    assert (code, starts) == (0, 4)


def test_the_same_steps_once_more_are_no_progress(tmp_path: Path) -> None:
    code, starts, _ = ended(tmp_path, 1, "step1 step2 kill", "step1 step2 kill", "0")
    assert (code, starts) == (75, 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_nothing_is_started_again(tmp_path: Path, number: int, code: int) -> None:
    process = start(tmp_path, 5, "wait", "0")
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    assert len(list(tmp_path.iterdir())) == 1


def test_the_scheduler_ends_with_its_supervisor(tmp_path: Path) -> None:
    process = start(tmp_path, 5, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    (child,) = (int(file.name) for file in tmp_path.iterdir())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not psutil.pid_exists(child), 60)
