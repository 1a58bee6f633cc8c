"""The kinds of stage. A kind is a folder here, whose Stage object owns all that is known about it, and an entry below.

Settings, the graph of `needs`, plans, progress, console, MLflow and the JSON schema follow from this one tuple.
"""

from __future__ import annotations

from pipelines.engine.stage import AnyStage
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.export.stage import ExportStage
from pipelines.stages.ladder.stage import LadderStage
from pipelines.stages.python.stage import PythonStage
from pipelines.stages.report.stage import ReportStage
from pipelines.stages.tokenize.stage import TokenizeStage
from pipelines.stages.tokenizer.stage import TokenizerStage
from pipelines.stages.train.stage import TrainStage

STAGES: tuple[AnyStage, ...] = (
    TokenizerStage(),
    TokenizeStage(),
    TrainStage(),
    EvaluateStage(),
    LadderStage(),
    ReportStage(),
    ExportStage(),
    PythonStage(),
)
