"""Clocks that are off by an hour, on another machine: the scheduler there dies, and this one takes over."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

from tests.faults.kinds.fault import Fault
from tests.faults.world import World

SKEW = Path(__file__).parent.parent / "skew"
_HOST = "another"


def _on_another_machine(world: World, offset_s: float) -> None:
    search_path = os.pathsep.join([str(SKEW), *filter(None, [world.environment.get("PYTHONPATH")])])
    world.environment |= {"PYTHONPATH": search_path, "FAULTS_HOST": _HOST, "FAULTS_CLOCK_S": str(offset_s)}


def _kill_there(world: World) -> None:
    """From now on commands run here, with the right clock."""
    world.command.process.kill()
    del world.environment["FAULTS_HOST"], world.environment["FAULTS_CLOCK_S"]


def _clear_there(world: World) -> None:
    """What a killed training leaves in the other machine's TMPDIR is removed by the next one there, not by us here."""
    for owner in (world.folder / "t").glob("bmojo-ray-train-*/owner.json"):
        if json.loads(owner.read_text())["host"] == _HOST:
            world.notes.append("a folder of Ray Train is left on the other machine")
            shutil.rmtree(owner.parent)


FAULTS = tuple(
    Fault(name, _kill_there, prepare=partial(_on_another_machine, offset_s=offset_s), after=_clear_there)
    for name, offset_s in (("clock-ahead", 3600.0), ("clock-behind", -3600.0))
)
