"""One experiment under way: its folder, its storage, its commands, and what can be seen of its run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from base.errors import UserError
from pipelines.engine.events import Status
from pipelines.engine.runs import Run, list_runs
from pipelines.engine.state import RunState, StageState
from pipelines.storage import LocalStorage, Storage
from tests.faults.experiments import Experiment
from tests.faults.places import CLUSTER_MARK, Place
from tests.faults.processes import send, victims
from tests.faults.reference import Reference
from tests.pipelines.tracking.mlflow_server import Server

LIMIT_S = 300.0  # of one command
_POLL_S = 0.05


class TooLateError(Exception):
    """The command ended before the fault could be injected."""


class HungError(Exception):
    """A command did not end."""


@dataclass
class Command:
    """`bmojo run` in a process of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """All that it printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit code. Raises HungError."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise HungError(f"process {self.process.pid} did not end in {LIMIT_S:.0f} s") from error


@dataclass
class World:
    """What faults work on."""

    experiment: Experiment
    place: Place
    reference: Reference
    folder: Path
    storage: Storage
    rng: random.Random  # for what a fault leaves to chance
    environment: dict[str, str]  # of the commands; a fault may change it
    arguments: list[str]
    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    on_end: ExitStack = field(default_factory=ExitStack)  # what must be undone, whatever happens
    mlflow: Server | None = None
    damage: tuple[str, bytes, str] | None = None  # a file, its content before, and what may be deleted instead

    @property
    def stage(self) -> str:
        """The stage that the fault is for."""
        return self.experiment.stage

    @property
    def mark(self) -> str:
        """Of the processes of its commands."""
        return self.experiment.name

    def fill(self) -> None:
        """Put the results of the other stages into the storage, so that they are reused."""
        for name, stage in self.reference.state.stages.items():
            if name not in self.experiment.missing and stage.artifact is not None:
                source = Path(self.reference.run.storage.url) / stage.artifact
                if isinstance(self.storage, LocalStorage):
                    shutil.copytree(source, Path(self.storage.url) / stage.artifact, dirs_exist_ok=True)
                else:
                    self.storage.put_tree(source, stage.artifact)

    def start(self) -> Command:
        """The command, for the first time or again."""
        log = self.folder / f"command-{len(self.commands) + 1}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", "run", str(self.reference.pipeline), *self.arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        self.commands.append(Command(process, log))
        return self.commands[-1]

    @property
    def command(self) -> Command:
        """The latest."""
        return self.commands[-1]

    def run(self) -> Run | None:
        """The run, once it is there."""
        return next(iter(list_runs(self.storage)), None)

    def state(self) -> RunState | None:
        """As the event log says; None while there is none."""
        run = self.run()
        try:
            return None if run is None else run.stored_state()
        except UserError:
            return None

    def stage_state(self) -> StageState | None:
        """That of the stage the fault is for."""
        state = self.state()
        return None if state is None else state.stages.get(self.stage)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Return when it holds. Raises TooLateError: the command ended before."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            code = self.command.process.poll()
            if code == 0:
                raise TooLateError("the command had ended")
            if code is not None:
                raise RuntimeError(f"the command ended with {code} before the fault:\n{self.command.output[-2000:]}")
            if time.monotonic() > deadline:
                raise HungError(f"{self.stage} did not get so far in {LIMIT_S:.0f} s")
            time.sleep(_POLL_S)

    def wait_until_running(self) -> None:
        """Return when a process works on the stage. Raises TooLateError."""

        def is_running() -> bool:
            stage = self.stage_state()
            if stage is not None and stage.status is Status.SUCCEEDED:
                raise TooLateError(f"{self.stage} was done already")
            return stage is not None and stage.status is Status.RUNNING and stage.pid is not None

        self.wait_for(is_running)

    def stage_pid(self) -> int:
        """The process that works on the stage. Raises TooLateError."""
        stage = self.stage_state()
        if stage is None or stage.pid is None or stage.status is not Status.RUNNING or not psutil.pid_exists(stage.pid):
            raise TooLateError(f"nobody works on {self.stage} any more")
        return stage.pid

    def victim(self, kind: str) -> int:
        """The process of a kind in VICTIMS that is hit: any of them, once there is one. Raises TooLateError."""
        mark = CLUSTER_MARK if self.place.where == "cluster" and kind != "keeper" else self.mark
        found: list[psutil.Process] = []

        def is_there() -> bool:
            stage = self.stage_state()
            if stage is not None and stage.status is Status.SUCCEEDED:
                raise TooLateError(f"{self.stage} was done before there was a {kind}")
            found[:] = victims(mark, kind)
            return bool(found)

        self.wait_for(is_there)
        return self.rng.choice(found).pid

    def kill_commands(self) -> None:
        """SIGKILL the schedulers."""
        for command in self.commands:
            if command.process.poll() is None:
                send(command.process.pid, signal.SIGCONT)
                command.process.kill()
                command.process.wait()

    def artifact(self, stage: str) -> str:
        """Path of its artifact in the storage."""
        found = self.reference.state.stages[stage].artifact
        assert found is not None
        return found
