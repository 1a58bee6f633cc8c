"""Who a process is, such that another one on the same machine can tell whether it still lives."""

from __future__ import annotations

import json
import os
import socket
from functools import lru_cache
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

_START_TOLERANCE_S = 1.0


class ProcessIdentity(BaseModel):
    """A process, told apart from a later one that got the same number, on this machine or after a restart of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    boot_id: str  # of the running kernel and, in containers, the space of process numbers
    pid: int
    started_at: float  # seconds since the epoch
    ray_job: str | None

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        """The identity of the calling process."""
        return cls(
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid=os.getpid(),
            started_at=psutil.Process().create_time(),
            ray_job=submitted_job(),
        )

    def is_on_this_machine(self) -> bool:
        """Whether this process's number means the same process here."""
        return self.host == socket.gethostname() and self.boot_id == _boot_id()

    def is_known_dead(self) -> bool:
        """True only where it is certain: same machine, and no such process any more."""
        if not self.is_on_this_machine():
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_at) <= _START_TOLERANCE_S
            return not same or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        job = f", Ray job {self.ray_job}" if self.ray_job else ""
        return f"process {self.pid} on {self.host}{job}"


@lru_cache(maxsize=1)
def _boot_id() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"booted-{psutil.boot_time():.0f}"


def submitted_job() -> str | None:
    """The submitted Ray job that this process works for; None outside of one.

    Ray gives the entry point of a job its settings in a variable, which the processes below it inherit.
    """
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, TypeError, ValueError):
        return None
