"""A kind of stage that saves its work when it is told to end, and a command that runs one: orderly_kind STORAGE."""

from __future__ import annotations

import sys
import time
from typing import Literal

from pipelines.engine.graph import stage_graph
from pipelines.engine.interrupts import handle_signals
from pipelines.engine.pipeline import Pipeline
from pipelines.engine.scheduler import run_pipeline
from pipelines.engine.stage import Stage, StageConfig, StageContext, StageInputs, StageOutput
from pipelines.errors import InfrastructureError
from pipelines.storage import open_storage
from tests.pipelines.engine.counting_pipeline import nowhere
from tests.pipelines.engine.toy_kinds import Toys

SCRIPT = (sys.executable, "-m", "tests.pipelines.engine.orderly_kind")


class OrderlyConfig(StageConfig):
    kind: Literal["orderly"] = "orderly"


class OrderlyStage(Stage[OrderlyConfig, StageInputs, StageOutput]):
    code_version = 1
    stops_in_order = True

    def run(self, config: OrderlyConfig, inputs: StageInputs, context: StageContext) -> StageOutput:
        context.artifact.write_json("begun.json", {})
        context.stop.wait(600)
        time.sleep(0.7)  # takes to save
        context.artifact.write_json("saved.json", {})
        raise InfrastructureError("stopped in order")


def main() -> None:
    handle_signals()
    graph = stage_graph({"orderly": OrderlyConfig()}, (OrderlyStage(),))
    result = run_pipeline(Pipeline("orderly", graph, open_storage(sys.argv[1])), nowhere(), Toys())
    sys.exit(result.failure.exit_code if result.failure else 0)


if __name__ == "__main__":
    from tests.pipelines.engine.orderly_kind import main as run_main  # so that other processes find the kind

    run_main()
