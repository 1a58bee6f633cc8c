"""A kind of stage in a module that the processes of stages cannot import, if the variable FATAL_KIND says how."""

from __future__ import annotations

import os
from typing import Literal

from pipelines.engine.stage import Stage, StageConfig, StageContext, StageInputs, StageOutput

if os.environ.get("FATAL_KIND") == "exits":
    os._exit(9)
if os.environ.get("FATAL_KIND") == "raises":
    raise RuntimeError("no such library")


class FatalConfig(StageConfig):
    kind: Literal["fatal"] = "fatal"


class FatalStage(Stage[FatalConfig, StageInputs, StageOutput]):
    code_version = 1

    def run(self, config: FatalConfig, inputs: StageInputs, context: StageContext) -> StageOutput:
        return StageOutput()
