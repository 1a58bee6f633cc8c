"""A kind of stage that does what its settings say, for tests of the scheduler; and pipelines of it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field

from base.config import NOT_IN_FINGERPRINT
from base.errors import UserError
from pipelines.engine.event_log import read_events
from pipelines.engine.events import Event
from pipelines.engine.graph import stage_graph
from pipelines.engine.interrupts import handle_signals
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.placement import ClusterNode
from pipelines.engine.processes import Launcher
from pipelines.engine.results import RunResult
from pipelines.engine.runs import Run
from pipelines.engine.scheduler import run_pipeline
from pipelines.engine.stage import (
    ClosedGate,
    NamedInputs,
    Stage,
    StageConfig,
    StageContext,
    StageOutput,
)
from pipelines.storage import Storage, open_storage
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.replay import Replay
from tests.pipelines.engine.counting_pipeline import InThreads, NoCluster, nowhere
from tests.pipelines.waiting import wait_until

Deed = Literal["work", "hang", "raise", "lose", "user", "die", "die with a child", "leave", "terminate", "warn"]


IN_THREADS = InThreads()


class ToyConfig(StageConfig):
    kind: Literal["toy"] = "toy"
    seed: int = 0
    seconds: float = Field(0.0, json_schema_extra=NOT_IN_FINGERPRINT)
    deed: Deed = Field("work", json_schema_extra=NOT_IN_FINGERPRINT)
    times: int = Field(1, json_schema_extra=NOT_IN_FINGERPRINT)  # attempts that do the deed; later ones work
    gate: Literal["open", "stop", "fail"] = Field("open", json_schema_extra=NOT_IN_FINGERPRINT)
    gets_further: bool = Field(False, json_schema_extra=NOT_IN_FINGERPRINT)


class ToyOutput(StageOutput):
    pid: int
    began_at: float
    ended_at: float
    attempts: int


class ToyStage(Stage[ToyConfig, NamedInputs, ToyOutput]):
    code_version = 1

    def closed_gate(self, config: ToyConfig, output: ToyOutput) -> ClosedGate | None:
        return None if config.gate == "open" else ClosedGate("loss is 5, above 4", fails=config.gate == "fail")

    def run(self, config: ToyConfig, inputs: NamedInputs, context: StageContext) -> ToyOutput:
        began_at = time.time()
        attempts = len(context.artifact.listdir("attempts")) + 1
        context.artifact.write_json(f"attempts/{attempts}.json", {"pid": os.getpid(), "at": began_at})
        if config.deed != "work" and attempts <= config.times:
            _do(config.deed, context)
        _nap(config.seconds, context)
        return ToyOutput(pid=os.getpid(), began_at=began_at, ended_at=time.time(), attempts=attempts)

    def mark(self, config: ToyConfig, artifact: ArtifactDir) -> int:
        return len(artifact.listdir("attempts")) if config.gets_further else 0


def _do(deed: Deed, context: StageContext) -> None:
    if deed == "hang":
        _nap(600, context)
    elif deed == "raise":
        raise RuntimeError("a bug")
    elif deed == "lose":
        raise ConnectionResetError("gone")
    elif deed == "user":
        raise UserError("no such file")
    elif deed == "warn":
        logging.getLogger("data.somewhere").warning("half of it was left out")
        return
    elif deed == "leave":
        os._exit(3)
    elif deed == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        _nap(600, context)
    elif deed == "die with a child":
        child = os.fork()
        if child == 0:
            time.sleep(600)
        context.artifact.write_json("child.json", {"pid": child})
    os.kill(os.getpid(), signal.SIGKILL)


def _nap(seconds: float, context: StageContext) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if context.stop.is_set():  # in a thread; in a process of its own, SIGTERM raises
            raise SystemExit
        time.sleep(0.01)


class Toys(NoCluster):
    """A cluster with these nodes."""

    def __init__(self, *nodes: Mapping[str, float]) -> None:
        super().__init__()
        self._nodes = [ClusterNode(node) for node in nodes or ({"CPU": 64.0},)]

    def nodes(self) -> list[ClusterNode]:
        return self._nodes


def toy_pipeline(storage: Storage, **stages: Mapping[str, Any]) -> Pipeline:
    """Each stage's settings by its name; every one has a seed of its own unless it is given."""
    configs = {
        name: ToyConfig.model_validate({"seed": number, "backoff_s": 0, **fields})
        for number, (name, fields) in enumerate(stages.items(), start=1)
    }
    return Pipeline("toys", stage_graph(configs, (ToyStage(),)), storage)


def run_toys(
    storage: Storage,
    *,
    cluster: Toys | None = None,
    launcher: Launcher | None = IN_THREADS,
    **stages: Mapping[str, Any],
) -> RunResult:
    """Run in threads of this process, unless another launcher is given, or none: then in processes."""
    return run_pipeline(
        toy_pipeline(storage, **stages), nowhere(), cluster or Toys(), launcher=launcher,
        lease_renew_s=0.2,
    )  # fmt: skip


def events_of(run: Run, stage: str | None = None) -> list[Event]:
    """The history, of one stage if it is given."""
    entries = read_events(run.storage, run.events_relpath)
    return [event for _, event in entries if stage is None or getattr(event, "stage", None) == stage]


def names_of(run: Run, stage: str | None = None) -> list[str]:
    """The kinds of event in the history."""
    return [event.event for event in events_of(run, stage)]


def when(condition: Callable[[], object], deed: Callable[[], None]) -> threading.Thread:
    """A thread, started, that does something once a condition holds."""

    def wait() -> None:
        wait_until(condition)
        deed()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


SCRIPT = (sys.executable, "-m", "tests.pipelines.engine.toy_kinds")
"""Then: STORAGE STAGES, where STAGES is JSON. Runs them, each attempt in a process of its own."""


def main() -> int:
    handle_signals()
    Replay.deliver = lambda self: False  # type: ignore[method-assign]  # MLflow has tests of its own
    result = run_pipeline(toy_pipeline(open_storage(sys.argv[1]), **json.loads(sys.argv[2])), nowhere(), Toys())
    return result.failure.exit_code if result.failure else 0


if __name__ == "__main__":  # under its real name, by which the processes of stages find the kind
    from tests.pipelines.engine import toy_kinds as itself

    sys.exit(itself.main())
