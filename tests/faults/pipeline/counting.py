"""The `python` stage: counts in steps, and keeps how far it is in its folder."""

from __future__ import annotations

import json
import time

from pipelines.stages.python import RunningStage


def count(stage: RunningStage) -> dict[str, float]:
    """Write steps.json: the sum so far, kept after every step."""
    state = stage.folder / "steps.json"
    done, total = json.loads(state.read_text()) if state.exists() else (0, 0)
    for step in range(done + 1, stage.args["steps"] + 1):
        time.sleep(stage.args["step_s"])
        total += step * stage.inputs["tokens"].output.vocab_size
        stage.log_metrics(step, {"count/total": total})
        unfinished = stage.folder / "unfinished.json"
        unfinished.write_text(json.dumps([step, total]))
        unfinished.rename(state)
        stage.save()
    return {"count/final": total}
