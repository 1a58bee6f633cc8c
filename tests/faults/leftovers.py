"""What an experiment may not leave behind once its run has succeeded."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from base.files import is_temporary
from pipelines.engine.lease import lease_holder
from tests.faults.places import CLUSTER_MARK
from tests.faults.processes import marked, title
from tests.faults.world import World

_PATIENCE_S = 30.0  # Ray's agents see after some seconds that their raylet is gone
_RAYS_OWN = ("ray::IDLE", "ray::_AutoscalingCoordinator")  # the latter is one for the cluster, started by Ray Train
_UNFINISHED = re.compile(r"(^|/)(\.creating-|\.bmojo-write-test-)")


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def leftovers(world: World, shared_before: set[str]) -> Iterator[str]:
    """Say what is still there, after some patience with what is on its way out."""
    deadline = time.monotonic() + _PATIENCE_S
    while (processes := list(_processes(world))) and time.monotonic() < deadline:
        time.sleep(0.5)
    yield from processes
    if world.place.where == "local" and world.mlflow is None:  # MLflow's server leaves a folder there if it is killed
        yield from (f"/dev/shm/{name}" for name in sorted(shared_memory() - shared_before))
    for path in sorted((world.folder / "t").iterdir()):
        if path.name.startswith("bmojo-") and not _is_empty(path):
            yield f"$TMPDIR/{path.name}"
    for name in world.storage.files_under():
        if _UNFINISHED.search(name) or any(is_temporary(part) for part in name.split("/")):
            yield f"unfinished: {name}"
    run = world.run()
    held = [] if run is None else [run.lease_relpath]
    held += [f"leases/{name}" for name in world.storage.list("leases")]
    for relpath in held:
        holder = lease_holder(world.storage, relpath)
        if holder is not None:
            yield f"{relpath} is held by {holder}"


def _is_empty(path: Path) -> bool:
    """The registry of shared memory stays, with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def _processes(world: World) -> Iterator[str]:
    for process in marked(world.mark):
        yield f"process {process.pid}: {title(process)[:100]}"
    if world.place.where == "cluster":
        for process in marked(CLUSTER_MARK):
            name = title(process)
            if name.startswith("ray::") and not name.startswith(_RAYS_OWN):
                yield f"process {process.pid} of the cluster: {name[:100]}"
