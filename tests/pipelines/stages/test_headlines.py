"""What stages say about their results at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.config import PythonStdlibSource
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.results import Figure, MeasureResult
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.report.config import ReportStageConfig
from pipelines.stages.report.stage import ReportOutput, ReportStage
from pipelines.stages.tokenizer.stage import TokenizerOutput, TokenizerStage, TokenizerStageConfig
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.stages.evaluate.results import EVALUATION, SAMPLES, TEXT, output


@pytest.fixture
def artifact(tmp_path: Path) -> ArtifactDir:
    return ArtifactDir.at(tmp_path / "a[b]")


def test_an_evaluation_gives_its_main_figures_with_intervals_beside_the_baselines(artifact: ArtifactDir) -> None:
    config = EvaluateStageConfig(kind="evaluate")
    rest = "loss 3.21 \u00b1 0.11 nats per token, perplexity 24.8 (22.2 to 27.7), on 10 documents"
    assert EvaluateStage().headline(config, EVALUATION, artifact) == (
        f"[bold]1.456 \u00b1 0.052 bits per byte[/] (gzip -9 2.111, untrained 3.789), {rest}"
    )
    alone = output(TEXT.model_copy(update={"references": ()}))
    assert EvaluateStage().headline(config, alone, artifact) == f"[bold]1.456 \u00b1 0.052 bits per byte[/], {rest}"
    assert EVALUATION.summary() == "1.456 \u00b1 0.052 bits per byte; " + rest.replace(", perp", "; perp")
    assert EvaluateStage().headline(config, output(SAMPLES), artifact) is None
    assert output(SAMPLES).summary() is None


def test_an_evaluation_of_a_task_gives_the_right_answers_beside_chance(artifact: ArtifactDir) -> None:
    right = Figure(name="accuracy", value=0.75, better="higher", chance=0.125, is_main=True)
    of_task = TEXT.model_copy(update={"figures": (right, *TEXT.figures[1:]), "references": ()})
    headline = EvaluateStage().headline(EvaluateStageConfig(kind="evaluate"), output(of_task), artifact)
    assert headline is not None
    assert headline.startswith("[bold]accuracy 0.75[/] (chance 12.5%), loss 3.21")


def test_figures_go_to_the_trackers_with_their_intervals() -> None:
    right = Figure(name="accuracy", value=0.75, better="higher", chance=0.125)
    other = MeasureResult(name="far", kind="position", unit="document", num_units=3, figures=(right,))
    assert output(TEXT, other).figures() == {
        "eval/bits_per_byte": 1.456,
        "eval/bits_per_byte_low": 1.404,
        "eval/bits_per_byte_high": 1.508,
        "eval/loss": 3.21,
        "eval/loss_low": 3.1,
        "eval/loss_high": 3.32,
        "eval/perplexity": 24.78,
        "eval/perplexity_low": 22.2,
        "eval/perplexity_high": 27.66,
        "eval/gzip_bits_per_byte": 2.111,
        "eval/untrained_bits_per_byte": 3.789,
        "eval/far/accuracy": 0.75,
        "eval/far/chance_accuracy": 0.125,
    }


def test_a_figure_is_found_by_its_measure_and_name() -> None:
    assert EVALUATION.figure("text/loss") == TEXT.figures[1]
    assert EVALUATION.figure("text/gzip -9") is None
    assert EVALUATION.figure("recall/loss") is None


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
