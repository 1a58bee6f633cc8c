"""A kind of stage that works without Ray, step by step, and then the `bmojo` command that knows it.

python -m tests.pipelines.api.steps_kind run|status|... ; nothing is delivered to MLflow.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

import pipelines.stages
from base.config import NOT_IN_FINGERPRINT
from base.errors import UserError
from pipelines.engine.stage import (
    ProgressMetrics,
    Stage,
    StageConfig,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.tracking.replay import Replay, Replayer


class StepsConfig(StageConfig):
    """Do so many steps."""

    kind: Literal["steps"] = "steps"
    upto: int = 5
    scale: float = 1.0
    step_s: float = Field(0.0, json_schema_extra=NOT_IN_FINGERPRINT)
    fail: str = Field("", json_schema_extra=NOT_IN_FINGERPRINT)
    die_at: int | None = Field(None, json_schema_extra=NOT_IN_FINGERPRINT)


class StepsOutput(StageOutput):
    steps: int
    value: float

    def summary(self) -> str:
        return f"{self.steps} steps, as status shows them"

    def figures(self) -> dict[str, float]:
        return {"steps/value": self.value}


@dataclass(frozen=True)
class StepsInputs(StageInputs):
    before: tuple[StageNode[StepsStage], ...] = ()


class StepsStage(Stage[StepsConfig, StepsInputs, StepsOutput]):
    code_version = 1
    progress = ProgressMetrics("steps/total", {"steps/value": "value {:.1f}"})
    uses_cluster = False

    def run(self, config: StepsConfig, inputs: StepsInputs, context: StageContext) -> StepsOutput:
        context.journal.log_metrics(0, {"steps/total": config.upto})
        for step in range(1, config.upto + 1):
            if context.artifact.exists(f"steps/{step}.json"):
                continue
            time.sleep(config.step_s)
            print(f"{context.name} attempt {context.attempt} step {step}", flush=True)
            if step == config.die_at and context.attempt == 1:
                print("and no more", end="", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            context.artifact.write_json(f"steps/{step}.json", {"value": step})
            context.journal.log_metrics(step, {"steps/value": config.scale * step})
        if config.fail == "user":
            raise UserError("the text is empty; give another file")
        if config.fail == "bug":
            raise RuntimeError("a bug of the stage")
        return StepsOutput(steps=config.upto, value=config.scale * config.upto)


def register() -> None:
    """Add this kind, before anything reads which there are."""
    from tests.pipelines.api import steps_kind as itself

    pipelines.stages.STAGES = (*pipelines.stages.STAGES, itself.StepsStage())
    Replay.deliver = lambda self: False  # type: ignore[method-assign]  # MLflow has tests of its own
    Replayer.drain = lambda self, deadline_s: None  # type: ignore[method-assign]


if __name__ == "__main__":
    register()
    from pipelines.cli.app import main

    main()
