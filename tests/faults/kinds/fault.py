"""What a fault is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.experiments import STAGES
from tests.faults.places import Where
from tests.faults.world import World

Action = Callable[[World], None]


def nothing(world: World) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong while a stage runs, and what whoever owns the machines does about it."""

    name: str
    inject: Action  # at the moment; returns when it is over, or lasts until `lift`
    prepare: Action = nothing  # before the first command and before the storage is filled
    lift: Action = nothing  # after a command that failed, before the next
    after: Action = nothing  # after the last command, before its results are compared
    stages: tuple[str, ...] = STAGES
    places: tuple[Where, ...] = ("local", "cluster")
