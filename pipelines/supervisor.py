"""The process that starts the scheduler of a run again if that dies: `bmojo run --restarts N`, and submitted jobs.

supervise() forks. The child goes on as the scheduler and tells its parent how far each stage is. The parent does
nothing but wait, so there is little in it that could fail.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pipelines.engine.failures import EXIT_CANCELLED, EXIT_RESUMABLE

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
_CODES = {signal.SIGTERM: EXIT_RESUMABLE, signal.SIGINT: EXIT_CANCELLED}


@dataclass
class Budget:
    """Restarts that are left. The count begins again whenever a stage got further than before."""

    restarts: int
    used: int = 0
    farthest: dict[str, int] = field(default_factory=dict)

    def note(self, stage: str, step: int) -> None:
        """A stage is at `step`."""
        if step > self.farthest.get(stage, -1):
            self.farthest[stage] = step
            self.used = 0

    def take(self) -> float | None:
        """Use one of them. Returns the seconds to wait before it; None if none is left."""
        if self.used >= self.restarts:
            return None
        self.used += 1
        return float(min(FIRST_PAUSE_S * 2.0 ** min(self.used - 1, 30), LONGEST_PAUSE_S))


class ProgressPipe:
    """Where a scheduler tells its supervisor how far the stages are; nowhere if it has none."""

    FINISHED = 2**62  # a step beyond all others

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self._told: dict[str, int] = {}

    def tell(self, stage: str, step: int) -> None:
        """A stage is at `step`. Never waits: what does not fit into the pipe is left out."""
        if self._descriptor is not None and step > self._told.get(stage, -1):
            self._told[stage] = step
            with suppress(OSError):
                os.write(self._descriptor, f"{stage} {step}\n".encode())


def supervise(restarts: int, say: Callable[[str], None]) -> ProgressPipe:
    """Fork, and return in each child, which is to be the scheduler. The parent leaves by SystemExit.

    The scheduler is started again if it exits with 75 or is killed by a signal. It is not if this process was told to
    end: then the signal is passed on. Call it before there are other threads.

    Args: restarts: without progress in between. say: prints a line.
    """
    budget = Budget(restarts)
    while True:
        scheduler = _fork()
        if isinstance(scheduler, ProgressPipe):
            return scheduler
        code, told_to_end = scheduler.wait(budget)
        if told_to_end is not None:
            raise SystemExit(code if code >= 0 else _CODES[told_to_end])
        if code >= 0 and code != EXIT_RESUMABLE:
            raise SystemExit(code)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        pause_s = budget.take()
        if pause_s is None:
            say(f"The scheduler {how}, {restarts + 1} times without progress. It is not started again.")
            raise SystemExit(EXIT_RESUMABLE)
        say(f"The scheduler {how}. It starts again in {pause_s:.0f} s (restart {budget.used} of {restarts}).")
        time.sleep(pause_s)


@dataclass(frozen=True)
class _Scheduler:
    """The child, as its parent knows it."""

    pid: int
    progress: int  # the end of its pipe to read from
    life: int  # the end of a pipe that says by its being open that the parent lives

    def wait(self, budget: Budget) -> tuple[int, signal.Signals | None]:
        """Note its progress until it ends. Returns its exit code, and the signal that this process got meanwhile."""
        told: list[signal.Signals] = []

        def pass_on(number: int, _: Any) -> None:
            told.append(signal.Signals(number))
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

        before = {number: signal.signal(number, pass_on) for number in _CODES}
        try:
            _unblock()
            with os.fdopen(self.progress) as lines:
                for line in lines:
                    stage, _, step = line.rpartition(" ")
                    budget.note(stage, int(step))
            _, status = os.waitpid(self.pid, 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self.life)
        return os.waitstatus_to_exitcode(status), told[0] if told else None


def _fork() -> _Scheduler | ProgressPipe:
    """Returns the child in the parent, and the pipe to the parent in the child."""
    progress_read, progress_write = os.pipe()
    life_read, life_write = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _CODES)  # until each has its handlers
    pid = os.fork()
    if pid:
        os.close(progress_write)
        os.close(life_read)
        return _Scheduler(pid, progress_read, life_write)
    os.close(progress_read)
    os.close(life_write)
    os.set_blocking(progress_write, False)
    _unblock()
    threading.Thread(target=_end_with_parent, args=(life_read,), name="supervisor", daemon=True).start()
    return ProgressPipe(progress_write)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _CODES)


def _end_with_parent(life: int) -> None:
    os.read(life, 1)  # returns when the parent is gone
    os.kill(os.getpid(), signal.SIGTERM)
