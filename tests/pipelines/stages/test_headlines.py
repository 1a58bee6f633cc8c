"""What stages say about their results at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.config import PythonStdlibSource
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.report.config import ReportStageConfig
from pipelines.stages.report.stage import ReportOutput, ReportStage
from pipelines.stages.tokenizer.stage import TokenizerOutput, TokenizerStage, TokenizerStageConfig
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.stages.report.test_page import EVALUATION


@pytest.fixture
def artifact(tmp_path: Path) -> ArtifactDir:
    return ArtifactDir.at(tmp_path / "a[b]")


def test_an_evaluation_gives_its_loss_beside_the_baselines(artifact: ArtifactDir) -> None:
    config = EvaluateStageConfig(kind="evaluate")
    loss = "loss 3.2100 nats per token, perplexity 24.78, on 10 documents"
    assert EvaluateStage().headline(config, EVALUATION, artifact) == (
        f"[bold]1.456 bits per byte[/] (gzip -9 2.111, untrained 3.789), {loss}"
    )
    alone = EVALUATION.model_copy(update={"gzip_bits_per_byte": None, "untrained_bits_per_byte": None})
    assert EvaluateStage().headline(config, alone, artifact) == f"[bold]1.456 bits per byte[/], {loss}"


def test_an_evaluation_of_ids_that_are_no_text_gives_no_bytes(artifact: ArtifactDir) -> None:
    no_text: dict[str, object] = {"num_bytes": None, "bits_per_byte": None, "samples": ()}
    no_text |= {"gzip_bits_per_byte": None, "untrained_bits_per_byte": None}
    config = EvaluateStageConfig(kind="evaluate")
    loss = "loss 3.2100 nats per token, perplexity 24.78, on 10 documents"
    of_ids = EVALUATION.model_copy(update=no_text)
    assert EvaluateStage().headline(config, of_ids, artifact) == loss
    of_task = of_ids.model_copy(update={"accuracy": 0.75, "chance_accuracy": 0.125})
    assert EvaluateStage().headline(config, of_task, artifact) == (
        f"[bold]75.0% of the answers right[/] (chance 12.5%), {loss}"
    )
    assert set(of_task.figures()) == {"eval/loss", "eval/perplexity", "eval/accuracy", "eval/chance_accuracy"}
    assert of_task.report_cells()["accuracy"] == "75.0% (chance 12.5%)"
    assert "accuracy" not in of_ids.report_cells()


def test_a_report_gives_its_address_with_brackets_that_are_no_markup(artifact: ArtifactDir) -> None:
    headline = ReportStage().headline(ReportStageConfig(kind="report"), ReportOutput(), artifact)
    assert headline.endswith("/a\\[b]/report.html[/]")


@pytest.mark.parametrize(("load", "found", "is_said"), [(None, 400, True), (None, 512, False), ("folder", 400, False)])
def test_a_tokenizer_smaller_than_asked_for_is_noted(
    artifact: ArtifactDir, load: str | None, found: int, is_said: bool
) -> None:
    source = None if load else PythonStdlibSource(kind="python_stdlib")
    config = TokenizerStageConfig(kind="tokenizer", source=source, load=load, vocab_size=512)
    output = TokenizerOutput(vocab_size=found, eod_id=0, end_of_document="x", backend="tiktoken", sha256="0")
    headline = TokenizerStage().headline(config, output, artifact)
    assert ("400 token ids, not 512 (vocab_size)" in (headline or "")) is is_said
