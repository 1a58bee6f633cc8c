"""Clocks that are off by an hour, on another machine: the scheduler there dies, and this one takes over."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from tests.faults.kinds.fault import Fault
from tests.faults.world import World

SKEW = Path(__file__).parent.parent / "skew"


def _on_another_machine(world: World, offset_s: float) -> None:
    search_path = os.pathsep.join([str(SKEW), *filter(None, [world.environment.get("PYTHONPATH")])])
    world.environment |= {"PYTHONPATH": search_path, "FAULTS_HOST": "another", "FAULTS_CLOCK_S": str(offset_s)}


def _kill_there(world: World) -> None:
    """From now on commands run here, with the right clock."""
    world.command.process.kill()
    del world.environment["FAULTS_HOST"], world.environment["FAULTS_CLOCK_S"]


FAULTS = (
    Fault("clock-ahead", _kill_there, prepare=partial(_on_another_machine, offset_s=3600.0)),
    Fault("clock-behind", _kill_there, prepare=partial(_on_another_machine, offset_s=-3600.0)),
)
