"""Processes of an experiment: whoever has its mark in the environment."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress

import psutil

MARK = "BMOJO_FAULTS_MARK"
VICTIMS = {  # by the command line
    "worker": r"^ray::(?!IDLE|.*(Controller|Journal|Sync))",  # a worker of training, or of a task
    "controller": r"^ray::.*TrainController",
    "journal": r"^ray::.*Journal",
    "raylet": r"/raylet/raylet ",
    "gcs": r"/gcs/gcs_server ",
    "keeper": r" -m pipelines\.cluster_process",
}

Signal = Callable[[psutil.Process], None]


def marked(mark: str) -> list[psutil.Process]:
    """All live processes with this mark, but this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_live = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if is_live and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def title(process: psutil.Process) -> str:
    """Its command line, "" if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline()) or process.name()
    return ""


def victims(mark: str, kind: str) -> list[psutil.Process]:
    """The processes of a kind in VICTIMS, in the order of their numbers."""
    pattern = re.compile(VICTIMS[kind])
    return sorted((found for found in marked(mark) if pattern.search(title(found))), key=lambda found: found.pid)


def end_all(mark: str) -> None:
    """SIGKILL whatever has the mark, and what it starts meanwhile."""
    for _ in range(20):
        found = marked(mark)
        for process in found:
            send(process.pid, signal.SIGKILL)
        psutil.wait_procs(found, timeout=5)
        if not found:
            return


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
