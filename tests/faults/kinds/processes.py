"""Signals to processes: killed, told to end, stopped for longer than their lease."""

from __future__ import annotations

import signal
import threading
import time

from tests.faults.kinds.fault import Action, Fault
from tests.faults.places import TTL_S, ThreeRaylets
from tests.faults.processes import send
from tests.faults.world import World

WITH_TASKS = ("tokenizer", "tokens", "train", "evaluate", "export", "count")
_HEAD_AWAY_S = 30.0
WITH_JOURNAL = ("train", "count")  # written through an actor


def _kill_scheduler(world: World) -> None:
    world.command.process.kill()


def _terminate_scheduler(world: World) -> None:
    world.command.process.terminate()


def _kill_stage(world: World) -> None:
    send(world.stage_pid(), signal.SIGKILL)


def _terminate_stage(world: World) -> None:
    send(world.stage_pid(), signal.SIGTERM)


def _kill(kind: str) -> Action:
    def inject(world: World) -> None:
        send(world.victim(kind), signal.SIGKILL)

    return inject


def _kill_head(world: World) -> None:
    """The head of the cluster, which its owner starts again after a while; what waits for it goes on then."""
    send(world.victim("gcs"), signal.SIGKILL)
    again = threading.Timer(_HEAD_AWAY_S, _make_whole, (world,))
    again.start()
    world.on_end.callback(again.join)


def _make_whole(world: World) -> None:
    """Whoever owns the cluster starts again what died."""
    if isinstance(world.place, ThreeRaylets):
        world.place.nodes.make_whole()


def _stop_stage(world: World) -> None:
    """It wakes after its lease has ended."""
    pid = world.stage_pid()
    send(pid, signal.SIGSTOP)
    world.on_end.callback(send, pid, signal.SIGCONT)
    time.sleep(1.3 * TTL_S)
    send(pid, signal.SIGCONT)


def _stop_scheduler(world: World) -> None:
    """Another one takes over; the first wakes while it works, or when it is done."""
    _replace_stopped(world, [world.command.process.pid])


def _stop_both(world: World) -> None:
    """The scheduler and the process of the stage, as when a machine hangs."""
    _replace_stopped(world, [world.command.process.pid, world.stage_pid()])


def _replace_stopped(world: World, pids: list[int]) -> None:
    for pid in pids:
        send(pid, signal.SIGSTOP)
        world.on_end.callback(send, pid, signal.SIGCONT)
    time.sleep(1.3 * TTL_S)
    successor = world.start()
    if world.rng.random() < 0.5:
        time.sleep(world.rng.uniform(0.0, TTL_S))
        world.notes.append("woke while its successor worked")
    else:
        successor.wait()
        world.notes.append("woke when its successor was done")
    for pid in pids:
        send(pid, signal.SIGCONT)


FAULTS = (
    Fault("kill-scheduler", _kill_scheduler),
    Fault("kill-stage", _kill_stage),
    Fault("kill-worker", _kill("worker"), stages=WITH_TASKS),
    Fault("kill-controller", _kill("controller"), stages=("train",)),
    Fault("kill-journal", _kill("journal"), stages=WITH_JOURNAL),
    Fault("kill-keeper", _kill("keeper"), stages=WITH_TASKS),
    Fault("kill-raylet", _kill("raylet"), lift=_make_whole, stages=WITH_TASKS),
    Fault("kill-gcs", _kill_head, stages=WITH_TASKS),
    Fault("term-scheduler", _terminate_scheduler),
    Fault("term-stage", _terminate_stage),
    Fault("stop-scheduler", _stop_scheduler),
    Fault("stop-stage", _stop_stage),
    Fault("stop-both", _stop_both),
)
