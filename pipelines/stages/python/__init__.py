"""Your own function as a stage: `kind: python`. RunningStage is what the function is called with."""

from pipelines.stages.python.running import Input, RunningStage

__all__ = ["Input", "RunningStage"]
