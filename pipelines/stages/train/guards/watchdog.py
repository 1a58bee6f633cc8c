"""Ends a training in which nobody gets any further, and says which rank waits where (docs/design/0028).

Workers tell an actor on the driver's machine how far they are; a thread of the stage's process looks at it. When the
training hangs, it collects the stacks of all workers, looks after those that are silent, writes a report and kills them
all, also one that is stopped. The attempt is lost then, and the next one resumes from the newest checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import LostError
from pipelines.stages.train.guards.hang import HangReport, Heard, is_hanging, is_silent
from pipelines.stages.train.guards.pulse import Sign, period_s
from pipelines.storage.artifact import ArtifactDir

REPORTS = "hangs"
_ANSWER_S = 15.0  # of the actor, and of a look at a process
_STACKS_S = 10.0  # beside some periods

logger = logging.getLogger(__name__)


class Watch(NamedTuple):
    """How a training is watched. `report_to`: where reports go, `on_report`: told of each, by its path there."""

    num_workers: int
    hang_after_s: float
    report_to: ArtifactDir
    on_report: Callable[[str], object]


class Board:
    """The actor's body: what the workers told last."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[Sign, float]] = {}
        self._workers: dict[int, tuple[Any, str]] = {}
        self._stacks: dict[int, str] = {}
        self._wants_stacks = False

    def join(self, rank: int, actor: Any, node_id: str) -> None:
        """A worker begins: the handle of its actor, and its machine."""
        self._workers[rank] = (actor, node_id)

    def tell(self, sign: Sign) -> bool:
        """As Listener.tell."""
        self._heard[sign.rank] = (sign, time.monotonic())
        return self._wants_stacks

    def tell_stacks(self, rank: int, text: str) -> None:
        """As Listener.tell_stacks."""
        self._stacks[rank] = text

    def heard(self) -> list[Heard]:
        """The last sign of each worker."""
        now = time.monotonic()
        return [Heard(sign, now - at) for _, (sign, at) in sorted(self._heard.items())]

    def want_stacks(self) -> None:
        """Ask the workers for their stacks, with their next signs."""
        self._wants_stacks = True

    def stacks(self) -> dict[int, str]:
        """Those that came, by rank."""
        return self._stacks

    def workers(self) -> dict[int, tuple[Any, str]]:
        """Actor and machine of each worker, by rank."""
        return self._workers


class BoardHandle:
    """What a worker holds of the board: a Listener. Picklable."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def join(self, rank: int) -> None:
        """Say who this worker is. Call it in the worker."""
        context = ray.get_runtime_context()
        self._actor.join.remote(rank, context.current_actor, context.get_node_id())

    def num_joined(self) -> int:
        """Workers that have begun."""
        return len(ray.get(self._actor.workers.remote(), timeout=_ANSWER_S))

    def tell(self, sign: Sign) -> bool:
        """As Listener.tell; waits for the answer, so that signs do not pile up."""
        return bool(ray.get(self._actor.tell.remote(sign), timeout=_ANSWER_S))

    def tell_stacks(self, rank: int, text: str) -> None:
        """As Listener.tell_stacks."""
        ray.get(self._actor.tell_stacks.remote(rank, text), timeout=_ANSWER_S)


@contextmanager
def watched(watch: Watch) -> Iterator[BoardHandle]:
    """Watch the workers of one group, which are given the board, while the block runs.

    Raises: LostError: they hung. It names the ranks, and where they wait.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    watchdog = _Watchdog(actor, watch)
    watchdog.start()
    try:
        yield BoardHandle(actor)
    except Exception as error:
        if watchdog.found is not None:
            raise LostError(watchdog.found) from error
        raise
    finally:
        watchdog.stop()
        ray.kill(actor)


class _Watchdog:
    def __init__(self, actor: Any, watch: Watch) -> None:
        self.found: str | None = None  # the message about a hang
        self._actor, self._watch, self._period_s = actor, watch, period_s(watch.hang_after_s)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        suspicions = 0  # in a row: one alone may be of a machine that was asleep
        while not self._is_over.wait(self._period_s):
            try:
                heard = self._ask(self._actor.heard)
                suspicions = suspicions + 1 if is_hanging(heard, self._watch.hang_after_s) else 0
                if suspicions >= 2:
                    self._end()
                    return
            except Exception as error:  # of a cluster that does not answer: whoever trains on it hears that, too
                logger.warning("Could not look whether training hangs: %s", error)

    def _ask(self, method: Any) -> Any:
        return ray.get(method.remote(), timeout=_ANSWER_S)

    def _end(self) -> None:
        """Report, and kill the workers."""
        report = self._report()
        self.found = report.message()
        try:
            path = self._write(report)
            self.found += f" The stacks of all ranks are in {self._watch.report_to.url}/{path}."
            self._watch.on_report(path)
        except Exception as error:
            logger.warning("Could not write a report on a training that hangs: %s\n%s", error, report.text())
        for actor, _ in self._ask(self._actor.workers).values():
            with suppress(Exception):  # dead already
                ray.kill(actor)  # Ray sends SIGKILL to one that does not end, after 5 s

    def _report(self) -> HangReport:
        self._ask(self._actor.want_stacks)
        deadline = time.monotonic() + _STACKS_S + 2 * self._period_s
        while True:
            heard: list[Heard] = self._ask(self._actor.heard)
            stacks: dict[int, str] = self._ask(self._actor.stacks)
            quiet = [each for each in heard if is_silent(each, self._period_s)]
            if len(stacks) + len(quiet) >= len(heard) or time.monotonic() > deadline or self._is_over.is_set():
                break
            time.sleep(self._period_s / 2)
        workers = self._ask(self._actor.workers)
        silent = {
            each.sign.rank: look_at(each.sign.pid, workers[each.sign.rank][1])
            for each in heard
            if each.sign.rank not in stacks
        }
        return HangReport(self._watch.num_workers, self._watch.hang_after_s, heard, silent, stacks)

    def _write(self, report: HangReport) -> str:
        step = max(each.sign.step for each in report.heard)
        path = f"{REPORTS}/step-{step:08d}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.txt"
        local = self._watch.report_to.local / path
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_text(report.text())
        self._watch.report_to.publish(path)
        return path


def look_at(pid: int, node_id: str) -> str:
    """Why a worker says nothing, as its machine sees its process."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(process_state)
    answer = task.remote(pid)
    try:
        return str(ray.get(answer, timeout=_ANSWER_S))
    except Exception:  # of whatever kind: what is asked is whether it answers
        ray.cancel(answer, force=True)
        return "its machine does not answer"


def process_state(pid: int) -> str:
    """What this machine says of a process."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "its process is gone"
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "its process is stopped (SIGSTOP, or a debugger)"
    if status == psutil.STATUS_DISK_SLEEP:
        return "its process waits for a disk or a device, in the kernel"
    return f"its process is there ({status}), and its threads do not run"
