"""Attempts at stages run in processes of their own: what the scheduler hands over, hears back, and can do to them.

A process is started before it is needed and imports meanwhile, so that an attempt begins at once. It is a session of
its own, out of reach of the terminal's Ctrl-C; it ends by itself if the scheduler is gone (stage_process.py).
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import Field

from base.config import StrictConfig
from base.errors import UserError
from pipelines.engine.events import Status
from pipelines.engine.failures import EXIT_RESUMABLE, Failure
from pipelines.engine.lease import LeaseInfo
from pipelines.engine.placement import ClusterNode
from pipelines.engine.plan import PlannedStage
from pipelines.engine.stage import StageInputs

_SPARE_ENDS_S = 5.0
_LOOK_S = 0.5


@dataclass(frozen=True)
class StageJob:
    """One attempt, as handed to its process."""

    run_id: str
    planned: PlannedStage
    inputs: StageInputs  # with results
    attempt: int  # from 1
    journal: Path
    log: Path  # takes the output of the process, and what its workers print
    system_metrics: bool
    lease_ttl_s: float  # of the artifact's lease
    lease_renew_s: float
    connect: Callable[[], None] | None  # joins the cluster; None: the stage does not use it


class Outcome(StrictConfig):
    """How an attempt ended: its record is there, another run holds the artifact, or a failure."""

    held_by: LeaseInfo | None = None
    failure: Failure | None = Field(None)

    @property
    def is_done(self) -> bool:
        """Whether the stage's record is there."""
        return self.held_by is None and self.failure is None


class Cluster(Protocol):
    """The cluster that stages work on, as the scheduler knows it. It never connects to the cluster itself."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that every process of a stage needs before it imports anything."""

    def prepare(self) -> None:
        """Begin to start or find the cluster, without waiting."""

    def start(self) -> Callable[[], None]:
        """Wait until the cluster is there, again if it was lost.

        Returns: what a stage's process calls to join it; picklable.

        Raises: UserError, InfrastructureError.
        """

    def nodes(self) -> Sequence[ClusterNode]:
        """The machines there are; none if that is not known."""

    def is_lost(self) -> bool:
        """Whether the cluster was started and has ended since."""

    def close(self) -> None:
        """Let go of the cluster, or end it if it was started for this run."""


class Attempt(Protocol):
    """An attempt under way."""

    @property
    def pid(self) -> int:
        """The number of its process."""

    def stop(self) -> None:
        """Ask it to end; asked again, it ends without saving more."""

    def kill(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """Starts attempts."""

    def prepare(self) -> None:
        """Have a process ready for the next attempt."""

    def start(self, job: StageJob, on_end: Callable[[Outcome], None]) -> Attempt:
        """Begin an attempt. `on_end` is called once, from another thread.

        Raises: UserError: the kind of stage cannot be handed over.
        """

    def close(self) -> None:
        """End what was only prepared."""


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours in another process, whatever lies in the current directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables of such a process: those of this one and `more`. It finds the modules that this one finds."""
    search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, **more, "PYTHONPATH": search_path}


class StageProcess:
    """A process that waits for a job, does it, and ends."""

    def __init__(self, environment: Mapping[str, str], log_dir: Path, imports: Sequence[str]) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        read_end, write_end = os.pipe()
        try:
            with open(log_dir / "processes.log", "ab") as log:  # only until the job names its own
                self._process = subprocess.Popen(
                    python_module("pipelines.engine.stage_process", str(write_end), *imports),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(write_end,),
                    env=child_environment(environment),
                    start_new_session=True,
                )
        finally:
            os.close(write_end)
        self._answers = read_end
        self._reaped = threading.Lock()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether it still waits or works."""
        return self._process.poll() is None

    def begin(self, job: StageJob, on_end: Callable[[Outcome], None]) -> None:
        """Hand it its job. Raises: UserError: the kind of stage cannot be handed over."""
        data = _packed(job)
        threading.Thread(target=self._wait, args=(on_end,), name=f"stage {job.planned.name}", daemon=True).start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: _wait says so
            self._process.stdin.write(len(data).to_bytes(8, "big") + data)
            self._process.stdin.flush()  # and stays open: its end tells the process that we are gone

    def stop(self) -> None:
        """SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, also for what it started in its session."""
        self._signal(signal.SIGKILL, group=True)

    def end(self) -> None:
        """Take back a process that got no job."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_SPARE_ENDS_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        os.close(self._answers)

    def _signal(self, number: int, group: bool = False) -> None:
        with self._reaped:
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    (os.killpg if group else os.kill)(self.pid, number)

    def _wait(self, on_end: Callable[[Outcome], None]) -> None:
        said = self._hear()
        if said:
            on_end(Outcome.model_validate_json(said))
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_SPARE_ENDS_S)
            self.kill()
        code = self._process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it forked and left behind
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        if not said:
            on_end(Outcome(failure=lost_process(self.pid, code)))

    def _hear(self) -> bytes:
        """All that it says before it ends; a child that it forked may keep the pipe open for longer."""
        said, has_ended = b"", False
        with os.fdopen(self._answers, "rb", buffering=0) as answers:
            while True:
                if select.select([answers], [], [], 0 if has_ended else _LOOK_S)[0]:
                    part = answers.read(2**16)
                    if not part:
                        return said
                    said += part
                elif has_ended:
                    return said
                else:
                    has_ended = self._process.poll() is not None


class ProcessLauncher:
    """Keeps one process ready, and starts the next as soon as that one is used."""

    def __init__(self, environment: Mapping[str, str], log_dir: Path, imports: Sequence[str] = ()) -> None:
        """`imports`: modules that a waiting process imports."""
        self._environment, self._log_dir, self._imports = environment, log_dir, imports
        self._spare: StageProcess | None = None

    def prepare(self) -> None:
        """Start the spare process, unless there is one."""
        if self._spare is None or not self._spare.is_alive():
            self._spare = StageProcess(self._environment, self._log_dir, self._imports)

    def start(self, job: StageJob, on_end: Callable[[Outcome], None]) -> Attempt:
        """Hand the job to the spare process. Raises as Launcher.start."""
        self.prepare()
        process = self._spare
        assert process is not None
        process.begin(job, on_end)
        self._spare = None
        return process

    def close(self) -> None:
        """End the spare process."""
        if self._spare is not None:
            self._spare.end()
            self._spare = None


def unknown_kind(error: Exception) -> UserError:
    """The error of a kind of stage that only the scheduler's process has."""
    return UserError(
        f"The process of a stage cannot load it ({type(error).__name__}: {error}). A kind of stage must be in a module "
        "that can be imported, not in the script that is run. Move it there, and import it in the script."
    )


def _packed(job: StageJob) -> bytes:
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise unknown_kind(error) from error


def lost_process(pid: int, code: int) -> Failure:
    """The failure of an attempt whose process ended without a word."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (out of memory? see `dmesg`)" if code == -signal.SIGKILL else ""
    return Failure(
        Status.RESUMABLE,
        f"its process {pid} {how}{hint}; the same command resumes",
        None,
        EXIT_RESUMABLE,
        may_pass=True,
        is_loss=code < 0,
    )


def lost_cluster() -> Failure:
    """The failure of an attempt whose cluster has ended."""
    text = "the Ray cluster of this run has ended; the same command resumes"
    return Failure(Status.RESUMABLE, text, None, EXIT_RESUMABLE, may_pass=True, is_loss=True)


def lost_record(planned: PlannedStage) -> Failure:
    """The failure of an attempt that said that it is done, and left no record."""
    text = f"{planned.artifact.url}: its process said that it is done, and there is no record. Was it deleted?"
    return Failure(Status.RESUMABLE, text, None, EXIT_RESUMABLE, may_pass=True)
