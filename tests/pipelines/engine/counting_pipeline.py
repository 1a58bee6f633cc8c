"""A tiny pipeline for the engine's tests, and a command that runs it in a process of its own, to be killed.

    python -m tests.pipelines.engine.counting_pipeline STORAGE [--step-s S] [--upto N] [--fail TEXT] [--ttl-s S]
        [--renew-s S] [--elsewhere HOST] [--die-everywhere]

Stage `count` writes one file per step and journals a metric; `sum` adds them up. With --die-everywhere it runs, for
every k in turn and each time in a fresh storage, a process that kills itself just before its k-th change of a file,
then one that is left in peace; it prints what each pair came to.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from base.config import NOT_IN_FINGERPRINT
from base.errors import UserError
from pipelines.engine.attempt import make
from pipelines.engine.failures import classify
from pipelines.engine.graph import stage_graph
from pipelines.engine.interrupts import handle_signals
from pipelines.engine.lease import DEFAULT_RENEW_S, DEFAULT_TTL_S
from pipelines.engine.observer import Observer
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.placement import ClusterNode
from pipelines.engine.process import ProcessIdentity
from pipelines.engine.processes import Attempt, Launcher, Outcome, StageJob
from pipelines.engine.results import RunResult
from pipelines.engine.scheduler import run_pipeline
from pipelines.engine.stage import (
    AnyStage,
    Stage,
    StageConfig,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.storage import Storage, open_storage
from pipelines.tracking.mlflow.target import MlflowTarget
from pipelines.tracking.replay import Replay
from pipelines.tracking.run_tracking import TrackingOptions

SCRIPT = (sys.executable, "-m", "tests.pipelines.engine.counting_pipeline")
_ELSEWHERE = "COUNTING_PIPELINE_ELSEWHERE"


def pretend_to_be_elsewhere() -> None:
    """Have this process be of another machine, if the variable names one."""
    host = os.environ.get(_ELSEWHERE)
    if host is not None:
        me = ProcessIdentity.of_this_process()
        other = me.model_copy(update={"host": host, "boot_id": host})
        ProcessIdentity.of_this_process = classmethod(lambda cls: other)  # type: ignore[method-assign, assignment]


pretend_to_be_elsewhere()


class CountConfig(StageConfig):
    kind: Literal["count"] = "count"
    upto: int = 5
    step_s: float = Field(0.0, json_schema_extra=NOT_IN_FINGERPRINT)
    fail: str = Field("", json_schema_extra=NOT_IN_FINGERPRINT)


class CountOutput(StageOutput):
    steps: int


class CountStage(Stage[CountConfig, StageInputs, CountOutput]):
    code_version = 1

    def run(self, config: CountConfig, inputs: StageInputs, context: StageContext) -> CountOutput:
        for step in range(config.upto):
            if context.artifact.exists(f"steps/{step}.json"):
                continue
            time.sleep(config.step_s)
            context.journal.log_metrics(step, {"count": step})
            context.artifact.write_json(f"steps/{step}.json", {"value": step, "at": time.time()})
        if config.fail == "user":
            raise UserError("the text is empty; give another file")
        if config.fail == "connection":
            raise ConnectionResetError("gone")
        if config.fail == "bug":
            raise RuntimeError("a bug with password hf_abcdefghijklmnopqrstuvwxyz")
        return CountOutput(steps=config.upto)


class SumConfig(StageConfig):
    kind: Literal["sum"] = "sum"
    scale: float = 1.0


class SumOutput(StageOutput):
    total: float


@dataclass(frozen=True)
class SumInputs(StageInputs):
    counts: tuple[StageNode[CountStage], ...] = ()


class SumStage(Stage[SumConfig, SumInputs, SumOutput]):
    code_version = 1

    def run(self, config: SumConfig, inputs: SumInputs, context: StageContext) -> SumOutput:
        total = 0.0
        for source in inputs.counts:
            for name in source.artifact.listdir("steps"):
                total += source.artifact.read_json(f"steps/{name}")["value"]
        context.artifact.write_json("total.json", {"total": total})
        context.journal.log_artifact("total.json")
        context.journal.log_dataset("steps", "abc123", source.artifact.url)
        return SumOutput(total=config.scale * total)


KINDS: tuple[AnyStage, ...] = (CountStage(), SumStage())


def nowhere() -> TrackingOptions:
    """A tracking server that is not there; runs must not mind."""
    return TrackingOptions((MlflowTarget("http://127.0.0.1:9", "test"),), system_metrics=False, drain_s=0)


def counting_pipeline(storage: Storage, scale: float = 1.0, **count: Any) -> Pipeline:
    stages = {"count": CountConfig(**count), "sum": SumConfig(needs=("count",), scale=scale)}
    config = {"stages": {name: stage.model_dump(mode="json") for name, stage in stages.items()}}
    return Pipeline("counting", stage_graph(stages, KINDS), storage, config=config)


class NoCluster:
    """A cluster that stages need not join; counts how often it was asked for."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.starts = 0

    def prepare(self) -> None: ...

    def start(self) -> Callable[[], None]:
        self.starts += 1
        return do_nothing

    def nodes(self) -> list[ClusterNode]:
        return [ClusterNode({"CPU": 8.0})]

    def is_lost(self) -> bool:
        return False

    def close(self) -> None: ...


def do_nothing() -> None: ...


class InThreads:
    """Attempts in threads of this process, for tests that kill a whole run at one place."""

    def prepare(self) -> None: ...

    def start(self, job: StageJob, on_end: Callable[[Outcome], None]) -> Attempt:
        return _InThread(job, on_end)

    def close(self) -> None: ...


class _InThread:
    pid = os.getpid()

    def __init__(self, job: StageJob, on_end: Callable[[Outcome], None]) -> None:
        self._job, self._on_end, self._stop = job, on_end, threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            outcome = make(self._job, self._stop, do_nothing)
        except BaseException as error:
            outcome = Outcome(failure=classify(error))
        self._on_end(outcome)

    def stop(self) -> None:
        self._stop.set()

    def kill(self) -> None: ...


def run_here(storage: Storage, scale: float = 1.0, launcher: Launcher | None = None, **count: Any) -> RunResult:
    return run_pipeline(counting_pipeline(storage, scale, **count), nowhere(), NoCluster(), launcher=launcher)


def die_everywhere(root: Path, upto: int) -> int:
    for k in range(1, 1000):
        storage = open_storage(root / str(k))
        died = _in_child(storage, upto, die_at=k) == -signal.SIGKILL
        finished = _in_child(storage, upto, die_at=None) == 0
        print(k, "died" if died else "lived", "finished" if finished else "FAILED", flush=True)
        if not died:
            return 0
    return 1


def _in_child(storage: Storage, upto: int, die_at: int | None) -> int:
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: None  # only a power cut would tell the difference
        if die_at is not None:
            _die_before_change(die_at)
        try:
            os._exit(0 if run_here(storage, upto=upto, launcher=InThreads()).status == "SUCCEEDED" else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_before_change(k: int) -> None:
    changes = itertools.count(1)

    def deadly(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            if next(changes) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return changed

    for name in ("replace", "link", "write", "unlink", "mkdir", "ftruncate"):
        setattr(os, name, deadly(getattr(os, name)))


class Printing(Observer):
    """Says how far it is on standard output."""

    def on_metrics(self, stage: Any, step: int, values: Any) -> None:
        if "count" in values:
            print("step", step, flush=True)


def main() -> int:
    handle_signals()
    parser = argparse.ArgumentParser()
    parser.add_argument("storage")
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--upto", type=int, default=5)
    parser.add_argument("--fail", default="")
    parser.add_argument("--ttl-s", type=float, default=DEFAULT_TTL_S)
    parser.add_argument("--renew-s", type=float, default=DEFAULT_RENEW_S)
    parser.add_argument("--elsewhere", default="", help="be a driver of another machine, of this name")
    parser.add_argument("--die-everywhere", action="store_true")
    arguments = parser.parse_args()
    Replay.deliver = lambda self: False  # type: ignore[method-assign]  # MLflow has tests of its own
    if arguments.elsewhere:
        os.environ[_ELSEWHERE] = arguments.elsewhere  # also for the processes of stages
        pretend_to_be_elsewhere()
    if arguments.die_everywhere:
        return die_everywhere(Path(arguments.storage), arguments.upto)
    try:
        pipeline = counting_pipeline(
            open_storage(arguments.storage), upto=arguments.upto, step_s=arguments.step_s, fail=arguments.fail
        )
        result = run_pipeline(
            pipeline, nowhere(), NoCluster(), Printing(), lease_ttl_s=arguments.ttl_s, lease_renew_s=arguments.renew_s
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    outputs = {name: node.output for name, node in result.stages.items()}
    print(result.status, outputs, result.failure.text if result.failure else "", flush=True)
    return result.failure.exit_code if result.failure else 0


if __name__ == "__main__":  # under its real name, by which the processes of stages find the kinds
    from tests.pipelines.engine import counting_pipeline as itself

    sys.exit(itself.main())
