"""One experiment from an empty storage to a verdict."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.engine.events import Status
from pipelines.engine.provenance import git_commit
from pipelines.storage import LocalStorage
from tests.faults.experiments import Experiment
from tests.faults.kinds import FAULTS
from tests.faults.leftovers import leftovers, shared_memory
from tests.faults.places import Place
from tests.faults.processes import end_all
from tests.faults.reference import Reference, bits_of, differing_points, mlflow_points_of, points_of
from tests.faults.world import HungError, TooLateError, World

MOST_AGAIN = 4  # times that the same command is run again
_SOONER = 4  # tries to inject, each at half the moment of the one before
_SYNC_S = 120.0
_CODES = {0, 75, -signal.SIGKILL, -signal.SIGTERM}  # a run that ended, may be resumed, or was killed


@dataclass(frozen=True)
class Outcome:
    """What became of one experiment."""

    number: int
    commit: str  # of the code
    fault: str
    where: str
    stage: str
    moment_s: float  # after the stage began
    outcome: str
    is_recovered: bool
    exit_codes: tuple[int, ...]  # of the commands, in the order in which they began
    seconds: float  # from the first command to the result
    seconds_lost: float  # more than an unbroken run takes
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Outcome:
        """From a report."""
        fields: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
        return cls(**fields)


def perform(experiment: Experiment, place: Place, reference: Reference, work: Path) -> Outcome:
    """Try to inject the fault until it hits, and judge what follows. Keeps the folder of a failed experiment."""
    folder = work / experiment.name
    for _ in range(_SOONER):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            outcome = _attempt(experiment, place, reference, folder)
        except TooLateError as error:
            missed = str(error)
            experiment = replace(experiment, moment=experiment.moment / 2)
        else:
            if outcome.is_recovered:
                shutil.rmtree(folder, ignore_errors=True)
            return outcome
    return _outcome(experiment, reference, "not hit", True, (), 0.0, (missed,), ())


def _attempt(experiment: Experiment, place: Place, reference: Reference, folder: Path) -> Outcome:
    fault = FAULTS[experiment.fault]
    folder.mkdir(parents=True)
    place.make_ready()
    storage = place.storage(experiment.name, folder)
    world = World(
        experiment, place, reference, folder, storage, experiment.rng(),
        place.environment(experiment.name, folder), place.arguments(storage),
    )  # fmt: skip
    shared_before = shared_memory()
    started_at = time.monotonic()
    ended_s = 0.0
    try:
        fault.prepare(world)
        world.fill()
        started_at = time.monotonic()
        world.start()
        world.wait_until_running()
        _wait_for_moment(world)
        fault.inject(world)
        codes = _recover(world)
        ended_s = time.monotonic() - started_at
        fault.after(world)
        problems = tuple(_problems(world, shared_before)) if codes[-1] == 0 else ("it did not end well",)
        if not experiment.fault.startswith("rot-") and not set(codes) <= _CODES:
            problems += (f"exit codes {codes}: 1 blames the user, 70 the program, for what broke around them",)
        again = len(codes) - 1
        what = "by itself" if again == 0 else f"by the same command ({again})"
        return _outcome(
            experiment, reference, "FAILED" if problems else what, not problems, codes, ended_s, world.notes, problems
        )
    except TooLateError:
        raise
    except (HungError, Exception) as error:
        (folder / "error.txt").write_text(traceback.format_exc())
        seconds, problem = time.monotonic() - started_at, f"{type(error).__name__}: {error}"
        codes = tuple(command.process.poll() or 0 for command in world.commands)
        return _outcome(experiment, reference, "FAILED", False, codes, seconds, world.notes, (problem,))
    finally:
        world.kill_commands()
        end_all(world.mark)
        world.on_end.close()
        if not isinstance(storage, LocalStorage):
            _empty(world)


def _empty(world: World) -> None:
    """The same experiment may come again, after it was too late."""
    for name in world.storage.list():
        world.storage.delete(name)


def _wait_for_moment(world: World) -> None:
    """Wait for a share of the stage's usual time. Raises TooLateError: it did not take as long."""
    until = time.monotonic() + world.experiment.moment * world.reference.seconds_in(world.stage)
    while time.monotonic() < until:
        world.stage_pid()
        time.sleep(0.05)
    world.stage_pid()


def _recover(world: World) -> tuple[int, ...]:
    """Run the same command again until it succeeds. Returns the exit codes of all commands."""
    lift = FAULTS[world.experiment.fault].lift
    code = world.command.wait()
    for _ in range(MOST_AGAIN):
        if code == 0:
            break
        lift(world)
        code = world.start().wait()
    return tuple(command.wait() for command in world.commands)


def _problems(world: World, shared_before: set[str]) -> list[str]:
    """Everything in which the result differs from the reference."""
    found = []
    state, run = world.state(), world.run()
    if state is None or run is None or state.status is not Status.SUCCEEDED:
        return [f"the run is {None if state is None else state.status} after a command that ended with 0"]
    bits = bits_of(world.storage, state)
    found += [f"other bits: {path}" for path, bit in world.reference.bits.items() if bits.get(path) != bit]
    wanted = {stage: world.reference.points[stage] for stage in world.experiment.missing & set(world.reference.points)}
    found += differing_points("journal", points_of(run), wanted)
    database = _mlflow_database(world)
    if list(differing_points("MLflow", mlflow_points_of(database), wanted)):
        _sync(world, run.run_id)
    found += differing_points("MLflow", mlflow_points_of(database), wanted)
    return [*found, *(f"left behind: {what}" for what in leftovers(world, shared_before))]


def _mlflow_database(world: World) -> Path:
    if world.mlflow is not None:
        return world.mlflow.root / "mlflow.db"
    if isinstance(world.storage, LocalStorage):
        return Path(world.storage.url) / "mlflow" / "mlflow.db"
    return next(world.folder.glob(".bmojo/**/mlflow.db"))


def _sync(world: World, run_id: str) -> None:
    """What the command tells its user to do where points are not delivered yet."""
    world.notes.append("bmojo sync")
    subprocess.run(
        [sys.executable, "-m", "pipelines", "sync", run_id, "--storage", world.storage.url],
        env=world.environment, cwd=world.folder, capture_output=True, timeout=_SYNC_S,
    )  # fmt: skip


def _outcome(
    experiment: Experiment,
    reference: Reference,
    outcome: str,
    is_recovered: bool,
    codes: tuple[int, ...],
    seconds: float,
    notes: list[str] | tuple[str, ...],
    problems: tuple[str, ...],
) -> Outcome:
    usual_s = reference.seconds_from(experiment.stage)
    return Outcome(
        number=experiment.number,
        commit=git_commit() or "unknown",
        fault=experiment.fault,
        where=experiment.where,
        stage=experiment.stage,
        moment_s=round(experiment.moment * reference.seconds_in(experiment.stage), 1),
        outcome=outcome,
        is_recovered=is_recovered,
        exit_codes=codes,
        seconds=round(seconds, 1),
        seconds_lost=round(max(0.0, seconds - usual_s), 1),
        notes=tuple(notes),
        problems=problems,
    )
