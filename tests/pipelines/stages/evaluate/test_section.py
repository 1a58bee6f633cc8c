"""What an evaluation is called on the page of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.engine.stage import StageNode, StageResult
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.stage import Evaluated, EvaluateInputs, EvaluateStage
from pipelines.stages.train.stage import TrainStage
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.api.evaluated_runs import train_output
from tests.pipelines.stages.evaluate.results import EVALUATION


@pytest.mark.parametrize(
    ("evaluated", "is_ours", "subject"),
    [
        (Evaluated(stage="train", step=2, model="model"), True, "train"),
        (Evaluated(stage="train", step=1, model="model"), True, "train step 1"),
        (Evaluated(stage="train-3e-3", step=2, model="model"), True, "train"),  # reused from a run with other names
        (Evaluated(stage=None, step=None, model="org/model"), False, "org/model"),
    ],
)
def test_a_model_goes_by_its_stage_its_step_or_its_own_name(
    tmp_path: Path, evaluated: Evaluated, is_ours: bool, subject: str
) -> None:
    config: Any = None  # of the training: its section is another one's business
    result = StageResult("t" * 64, ArtifactDir.at(tmp_path / "train"), train_output())
    trained = StageNode("train", TrainStage(), config, config, result) if is_ours else None
    output = EVALUATION.model_copy(update={"evaluated": evaluated})
    artifact = ArtifactDir.at(tmp_path / "evaluate")
    node: Any = StageNode(
        "evaluate", EvaluateStage(), EvaluateStageConfig(kind="evaluate"), EvaluateInputs(trained=trained, tokens=()),
        StageResult("e" * 64, artifact, output),
    )  # fmt: skip
    section = EvaluateStage().section(node)
    assert (section.subject, section.source) == (subject, "evaluate")
    assert section.results == output.results
    assert section.artifact is artifact
