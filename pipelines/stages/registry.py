"""The kinds of stage there are."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.stages.base import Stage
from pipelines.stages.evaluate import EvaluateStage
from pipelines.stages.export import ExportStage
from pipelines.stages.report import ReportStage
from pipelines.stages.tokenize import TokenizeStage
from pipelines.stages.tokenizer import TokenizerStage
from pipelines.stages.train import TrainStage

STAGES: Mapping[str, Stage] = {
    stage.kind: stage
    for stage in (TokenizerStage(), TokenizeStage(), TrainStage(), EvaluateStage(), ReportStage(), ExportStage())
}
