"""The kinds of stage there are."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.engine.stage import Stage
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.export.stage import ExportStage
from pipelines.stages.report.stage import ReportStage
from pipelines.stages.tokenize.stage import TokenizeStage
from pipelines.stages.tokenizer.stage import TokenizerStage
from pipelines.stages.train.stage import TrainStage

STAGES: Mapping[str, Stage] = {
    stage.kind: stage
    for stage in (TokenizerStage(), TokenizeStage(), TrainStage(), EvaluateStage(), ReportStage(), ExportStage())
}
