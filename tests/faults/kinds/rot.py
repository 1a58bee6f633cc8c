"""Flipped bits: the scheduler is killed, one bit of a stored file changes, and the same command goes on."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import psutil

from tests.faults.experiments import NEEDS, STAGES
from tests.faults.kinds.fault import Action, Fault
from tests.faults.processes import marked
from tests.faults.world import TooLateError, World

_GONE_S = 30.0


def _kill_scheduler(world: World) -> None:
    """And wait until its processes have ended."""
    world.command.process.kill()
    world.command.process.wait()
    psutil.wait_procs(marked(world.mark), timeout=_GONE_S)
    time.sleep(1.0)


def _flip(world: World, candidates: Iterable[str], instead: str) -> None:
    """Change one bit of one of the files and run the same command; `instead` is what its owner may delete where it
    cannot be restored."""
    paths = sorted(candidates)
    if not paths:
        raise TooLateError("there is no such file")
    path = world.rng.choice(paths)
    whole = world.storage.read_bytes(path)
    damaged = bytearray(whole)
    place = world.rng.randrange(len(damaged))
    damaged[place] ^= 1 << world.rng.randrange(8)
    world.storage.write_bytes_atomic(path, bytes(damaged))
    world.damage = (path, whole, instead)
    world.notes.append(f"{path}, byte {place}")
    world.start()


def _in_artifact(world: World) -> None:
    """In the finished result of a stage that this one reads."""
    read = world.artifact(world.rng.choice(NEEDS[world.stage]))
    _kill_scheduler(world)
    files = world.storage.files_under(read)
    _flip(world, (f"{read}/{name}" for name in files if not re.match("checkpoints/|slices/", name)), read)


def _in_checkpoint(world: World) -> None:
    """In the newest one."""
    folder = f"{world.artifact('train')}/checkpoints"
    wanted = world.rng.randint(1, 3)

    def whole() -> list[str]:
        return sorted(name for name in world.storage.files_under(folder) if name.endswith("/manifest.json"))

    def is_far_enough() -> bool:
        newest = whole()[-1:]
        return bool(newest) and int(newest[0].split("/")[0].removeprefix("step-")) >= 4 * wanted

    world.wait_for(is_far_enough)
    _kill_scheduler(world)
    newest = whole()[-1].partition("/")[0]
    names = world.storage.files_under(f"{folder}/{newest}")
    _flip(world, (f"{folder}/{newest}/{name}" for name in names), folder)


def _in_run(part: str) -> Action:
    def inject(world: World) -> None:
        _kill_scheduler(world)
        run = world.run()
        assert run is not None
        folder = f"{run.relpath}/{part}"
        _flip(world, (f"{folder}/{name}" for name in world.storage.files_under(folder) if name), run.relpath)

    return inject


def _follow_advice(world: World) -> None:
    """Restore or delete what the error names, once."""
    if world.damage is None:
        return
    path, whole, instead = world.damage
    world.damage = None
    if world.rng.random() < 0.5:
        world.storage.write_bytes_atomic(path, whole)
        world.notes.append("restored")
    else:
        world.storage.delete(instead)
        world.notes.append(f"deleted {instead}")


def _restore_unread(world: World) -> None:
    """What nobody read was not noticed, and is no result of this run."""
    if world.damage is not None:
        path, whole, _ = world.damage
        if world.storage.exists(path):
            world.storage.write_bytes_atomic(path, whole)


FAULTS = (
    Fault("rot-artifact", _in_artifact, lift=_follow_advice, after=_restore_unread,
          stages=tuple(stage for stage in STAGES if NEEDS[stage])),
    Fault("rot-checkpoint", _in_checkpoint, lift=_follow_advice, stages=("train",)),
    Fault("rot-journal", _in_run("journal"), lift=_follow_advice, places=("local",)),
    Fault("rot-event", _in_run("events"), lift=_follow_advice),
)  # fmt: skip
