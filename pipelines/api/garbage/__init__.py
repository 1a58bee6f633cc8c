"""What may be thrown away: what nothing names, what dead processes left, what caches hold for too long.

Finding changes nothing. Nothing is touched whose lease is held or whose process may live. Each thing is looked at once
more right before it is deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.api.garbage.cached import cached
from pipelines.api.garbage.found import Garbage, GarbageReport, Limits, Thing
from pipelines.api.garbage.ray_leftovers import ray_leftovers
from pipelines.api.garbage.stored import Stored
from pipelines.engine.lease import Watch
from pipelines.storage import Storage

__all__ = ["Found", "Garbage", "GarbageReport", "Limits", "delete_garbage", "find_garbage"]


@dataclass(frozen=True)
class Found:
    """What may go, and what was left alone and why."""

    things: tuple[Thing, ...]
    notes: tuple[str, ...]

    def report(self) -> GarbageReport:
        """The same as facts."""
        return _report([thing.garbage for thing in self.things], self.notes, deleted=False)


def find_garbage(storage: Storage, limits: Limits | None = None, on_watch: Watch | None = None) -> Found:
    """Everything that may be thrown away: in this storage, in this machine's cache, and of Ray here.

    Args: on_watch: see pipelines.engine.lease.lease_holder.
    """
    limits = limits or Limits()
    stored = Stored(storage, limits, on_watch)
    things = (*stored.find(), *cached(storage, limits), *ray_leftovers(limits))
    return Found(things, tuple(stored.notes))


def delete_garbage(found: Found) -> GarbageReport:
    """Delete it. Returns what was deleted; `notes` says what was not, and why."""
    deleted, notes = [], list(found.notes)
    for thing in found.things:
        why_not = thing.delete()
        if why_not is None:
            deleted.append(thing.garbage)
        else:
            notes.append(f"{thing.garbage.path}: left alone: {why_not}")
    return _report(deleted, notes, deleted=True)


def _report(items: Sequence[Garbage], notes: Sequence[str], deleted: bool) -> GarbageReport:
    return GarbageReport(
        items=tuple(items), size_bytes=sum(item.size_bytes for item in items), notes=tuple(notes), deleted=deleted
    )
