"""The process of one attempt: `python -m pipelines.engine.stage_process ANSWERS [IMPORT]...`, started by the scheduler.

It imports, waits on its standard input for a StageJob, does it, and writes an Outcome to the descriptor ANSWERS. When
its standard input ends, the scheduler is gone, and it stops at once. The job comes from the process that started this
one, by a pipe that nobody else can write to, so unpickling it is safe.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any, BinaryIO

from pipelines.engine.attempt import make
from pipelines.engine.failures import classify
from pipelines.engine.interrupts import EXIT_TERMINATED, SAME_S, Terminated, interruptible, stop_ray_and_leave
from pipelines.engine.processes import Outcome, StageJob, unknown_kind
from pipelines.faults import explained_disk
from pipelines.tracking.environment import quiet_environment

_LEAVES_S = 10.0


def main() -> None:
    """Do one job."""
    quiet_environment()
    answers, imports = int(sys.argv[1]), sys.argv[2:]
    for module in imports:
        with suppress(ImportError):  # whoever needs it says so better
            importlib.import_module(module)
    data = _receive(sys.stdin.buffer)
    if not data:
        return
    outcome = _do(data)
    with suppress(BrokenPipeError), os.fdopen(answers, "wb") as pipe:  # broken if the scheduler is gone
        pipe.write(outcome.model_dump_json().encode())
    stop_ray_and_leave(0)


def _receive(pipe: BinaryIO) -> bytes:
    head = pipe.read(8)
    return pipe.read(int.from_bytes(head, "big")) if len(head) == 8 else b""


def _do(data: bytes) -> Outcome:
    try:
        job: StageJob = pickle.loads(data)
    except Exception as error:
        return Outcome(failure=classify(unknown_kind(error)))
    try:
        with explained_disk(str(job.log)):
            descriptor = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except Exception as error:
        return Outcome(failure=classify(error))
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    return _work(job)


def _work(job: StageJob) -> Outcome:
    stop = threading.Event()
    in_order = job.planned.node.stage.stops_in_order
    first: list[float] = []  # when the first signal came

    def on_terminate(*_: Any) -> None:
        if first and time.monotonic() - first[0] < SAME_S:
            return  # the same request, by another way: the scheduler passes it on
        first.append(time.monotonic())
        if in_order and not stop.is_set():
            stop.set()
            return
        raise Terminated(EXIT_TERMINATED)

    try:
        with interruptible() as interrupt:
            signal.signal(signal.SIGTERM, on_terminate)
            threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
            return make(job, stop, interrupt)
    except SystemExit as error:  # Terminated, or Ray's; the scheduler has its own reason if it asked for it
        return Outcome(failure=replace(classify(error), may_pass=True, is_loss=True))
    except BaseException as error:
        return Outcome(failure=classify(error))


def _watch_parent(stop: threading.Event) -> None:
    sys.stdin.buffer.read(1)
    stop.set()  # what is left of the cluster is no place to save anything
    os.kill(os.getpid(), signal.SIGTERM)
    timer = threading.Timer(_LEAVES_S, os._exit, (EXIT_TERMINATED,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
