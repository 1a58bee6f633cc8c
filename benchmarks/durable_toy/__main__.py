"""What a kill in the middle of three small stages costs: `python -m benchmarks.durable_toy --metaflow PYTHON`.

Each system runs the same toy: make 20 numbers, square them at 0.5 s each, add them up. It runs once undisturbed; once
its whole process tree is killed (SIGKILL) after 10 items, and the command that resumes it is given; and once only the
process that works is killed, and nothing is given. PYTHON is an interpreter of an environment with Metaflow.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
ITEMS_BEFORE_KILL = 10
TIMEOUT_S = 300


@dataclass(frozen=True)
class System:
    """A system under test."""

    name: str
    run: Sequence[str]
    resume: Sequence[str]
    done: Callable[[Path], int]  # number of items squared so far in a folder
    worker: Callable[[psutil.Process], bool]  # whether a process of the tree is the one that works


def our_items(folder: Path) -> int:
    """Files that the stage has written."""
    return len(list(folder.glob("runs/artifacts/python/square-*/files/[0-9]*.txt")))


def metaflow_items(folder: Path) -> int:
    """Lines that the step has printed."""
    return len(re.findall(r"item \d+", (folder / "out.txt").read_text()))


def ours() -> System:
    """The `bmojo` command of this checkout."""
    command = (sys.executable, "-m", "pipelines", "run", "toy.yaml")
    return System(
        "bmojo",
        command,
        command,
        our_items,
        lambda process: "stage_process" in " ".join(process.cmdline()),
    )


def metaflow(python: str) -> System:
    """Metaflow in another environment."""
    return System(
        "metaflow",
        (python, "metaflow_flow.py", "run"),
        (python, "metaflow_flow.py", "resume"),
        metaflow_items,
        lambda process: " step square" in " ".join(process.cmdline()),
    )


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in the folder, its output in out.txt."""
    environment = {
        **os.environ,
        "METAFLOW_HOME": str(folder / "home"),
        "METAFLOW_USER": "toy",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
        "PYTHONPATH": str(HERE.parent.parent),
    }
    with open(folder / "out.txt", "ab") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def finish(process: subprocess.Popen[bytes]) -> int:
    """Wait for its end. Returns the exit code."""
    return process.wait(timeout=TIMEOUT_S)


def wait_for_items(system: System, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when half of the items are done."""
    while system.done(folder) < ITEMS_BEFORE_KILL:
        if process.poll() is not None:
            raise SystemExit(f"{system.name} ended too soon:\n{(folder / 'out.txt').read_text()}")
        time.sleep(0.05)


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all below it."""
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def measure(system: System) -> None:
    """Print one line per experiment."""
    for experiment in ("undisturbed", "everything killed", "the working process killed"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file in HERE.iterdir():
                if file.is_file():
                    shutil.copy(file, folder)
            (folder / "out.txt").touch()
            started = time.monotonic()
            process = start(system.run, folder)
            typed = " ".join(system.run[1:])
            if experiment != "undisturbed":
                wait_for_items(system, folder, process)
                victims = tree(process)
                if experiment == "the working process killed":
                    victims = [victim for victim in victims if system.worker(victim)]
                for victim in victims:
                    victim.kill()
            killed_at = time.monotonic()
            code = finish(process)
            if code != 0 and experiment != "undisturbed":
                process = start(system.resume, folder)
                typed += f"; {' '.join(system.resume[1:])}"
                code = finish(process)
            now = time.monotonic()
            since = "" if experiment == "undisturbed" else f", {now - killed_at:.1f} s after the kill"
            print(
                f"{system.name:9} {experiment:27} exit {code}: {now - started:.1f} s{since}; typed: {typed}", flush=True
            )


def main() -> None:
    """Measure the systems in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metaflow", metavar="PYTHON", help="an interpreter whose environment has Metaflow")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    for _ in range(arguments.repeats):
        measure(ours())
        if arguments.metaflow:
            measure(metaflow(arguments.metaflow))


if __name__ == "__main__":
    main()
