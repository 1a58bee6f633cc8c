"""Servers that fail: the object store and MLflow."""

from __future__ import annotations

import time

from tests.faults.kinds.fault import Action, Fault
from tests.faults.places import S3, TTL_S, ThreeRaylets
from tests.faults.world import World
from tests.pipelines.tracking.mlflow_server import Server

_LASTS = (0.3, 1.5)  # in leases: 18 to 90 s of the usual 60


def _s3(world: World) -> S3:
    assert isinstance(world.place, ThreeRaylets)
    return world.place.s3


def _outage(world: World) -> None:
    seconds = TTL_S * world.rng.uniform(*_LASTS)
    world.notes.append(f"for {seconds:.0f} s, at leases of {TTL_S:.0f} s")
    time.sleep(seconds)


def _break(fault: str) -> Action:
    def inject(world: World) -> None:
        _s3(world).set_fault(fault)
        _outage(world)
        _s3(world).set_fault("")

    return inject


def _kill_s3(world: World) -> None:
    _s3(world).kill_front()
    _outage(world)
    _s3(world).start_front()


def _start_mlflow(world: World) -> None:
    root = world.folder / "mlflow"
    root.mkdir()
    world.mlflow = Server(root)
    world.on_end.callback(world.mlflow.kill)
    world.mlflow.start()
    world.environment["MLFLOW_TRACKING_URI"] = world.mlflow.uri


def _kill_mlflow(world: World) -> None:
    assert world.mlflow is not None
    world.mlflow.kill()
    _outage(world)
    world.mlflow.start()


FAULTS = (
    Fault("s3-503", _break("503 SlowDown"), places=("cluster",)),
    Fault("s3-reset", _break("reset"), places=("cluster",)),
    Fault("s3-hang", _break("hang"), places=("cluster",)),
    Fault("kill-s3", _kill_s3, places=("cluster",)),
    Fault("kill-mlflow", _kill_mlflow, prepare=_start_mlflow),
)
