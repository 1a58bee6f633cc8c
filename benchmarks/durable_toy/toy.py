"""The toy of benchmarks/durable_toy as stages of ours; toy.yaml names these functions."""

from __future__ import annotations

import json
import time

from pipelines.stages.python import RunningStage


def numbers(stage: RunningStage) -> dict[str, float]:
    """Write the numbers to be squared."""
    (stage.folder / "numbers.json").write_text(json.dumps(list(range(stage.args["items"]))))
    return {"count": stage.args["items"]}


def square(stage: RunningStage) -> dict[str, float]:
    """Square them slowly, one file per number, so that what is done stays done."""
    values = json.loads((stage.inputs["numbers"].path / "numbers.json").read_text())
    for done, number in enumerate(values, 1):
        file = stage.folder / f"{number}.txt"
        if not file.exists():
            time.sleep(stage.args["item_s"])
            file.write_text(str(number**2))
        stage.progress(done, len(values))
    return {"count": len(values)}


def total(stage: RunningStage) -> dict[str, float]:
    """Add them up."""
    folder = stage.inputs["square"].path
    return {"total": sum(int(file.read_text()) for file in folder.glob("[0-9]*.txt"))}
