"""A kind of stage that the report does not know, with a section: the page shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pytest

from pipelines.engine.stage import (
    AnyNode,
    Stage,
    StageConfig,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
    StageResult,
)
from pipelines.stages.report.config import ReportStageConfig
from pipelines.stages.report.page import build_report
from pipelines.stages.report.stage import ReportInputs, ReportStage, with_inputs
from pipelines.stages.sections import BarPlot, Line, LinePlot, Passage, Plot, Section
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal
from tests.pipelines.stages.report.test_page import MODEL


class RecallConfig(StageConfig):
    kind: Literal["recall"]


class RecallOutput(StageOutput):
    accuracy: float


@dataclass(frozen=True)
class RecallInputs(StageInputs):
    easier: StageNode[RecallStage] | None = None


class RecallStage(Stage[RecallConfig, RecallInputs, RecallOutput]):
    code_version = 1

    def run(self, config: RecallConfig, inputs: RecallInputs, context: StageContext) -> RecallOutput:
        raise NotImplementedError

    def section(self, node: StageNode[Self]) -> Section:
        return Section(
            subject=node.name,
            cells={"recall": f"{node.output.accuracy:.0%}"},
            notes=["Recall is the share of pairs that are found again."],
            plots=[
                LinePlot(file="recall.png", heading="Recall", alt="Recall by distance", title="Recall",
                         x_label="distance", lines=[Line([(1, 1.0), (9, node.output.accuracy)])])
            ],
            passages=[Passage("a1 b2 a", "1")],
        )  # fmt: skip


def recall_node(name: str, accuracy: float, folder: Path, easier: AnyNode | None = None) -> AnyNode:
    result = StageResult("0" * 64, ArtifactDir.at(folder / name), RecallOutput(accuracy=accuracy))
    inputs: Any = RecallInputs(easier=easier)
    return StageNode(name, RecallStage(), RecallConfig(kind="recall"), inputs, result)


def test_a_new_kind_is_on_the_page_with_what_it_reads(tmp_path: Path) -> None:
    easy = recall_node("easy", 0.97, tmp_path)
    hard: Any = recall_node("hard", 0.42, tmp_path, easy)
    artifact = ArtifactDir.at(tmp_path / "report")
    with Journal(tmp_path / "report.jsonl") as journal:
        context = StageContext("report", "f" * 64, artifact, journal)
        ReportStage().run(ReportStageConfig(kind="report"), ReportInputs(evaluated=(hard,)), context)
    page = (artifact.local / "report.md").read_text()
    assert "| model | recall |" in page
    assert "| easy | 97% |\n| hard | 42% |\n" in page
    assert page.count("share of pairs") == 1
    assert "## Recall\n\n![Recall by distance](recall.png)\n" in page
    assert (artifact.local / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "hard: Continuing 'a1 b2 a'" in page
    assert "### hard (recall, fingerprint ffffffff)" not in page
    assert "### hard (recall, fingerprint 00000000)" in page


def test_stages_come_after_what_they_read_and_once(tmp_path: Path) -> None:
    easy = recall_node("easy", 1.0, tmp_path)
    hard, other = (recall_node(name, 0.5, tmp_path, easy) for name in ("hard", "other"))
    assert [node.name for node in with_inputs([hard, easy, other])] == ["easy", "hard", "other"]


def test_a_measure_of_the_same_model_is_in_its_row_and_a_second_value_in_another() -> None:
    recall = [Section(subject="train", cells={"recall": value}) for value in ("90%", "80%")]
    page = build_report("Two", "", [MODEL.section(), *recall], []).markdown
    head, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert head.endswith("| MFU | recall |")
    assert [row.split(" | ")[-1] for row in rows] == ["90% |", "80% |"]
    assert rows[1].startswith("| train | - | - |")


def test_shares_of_one_picture_that_cannot_be_drawn_together_are_refused() -> None:
    about: dict[str, str] = {"file": "x.png", "heading": "", "alt": "", "title": "", "x_label": ""}
    plots: list[Plot] = [LinePlot(**about, lines=[]), BarPlot(**about, value=1.0)]
    sections = [Section(subject=str(n), cells={"c": "1"}, plots=[plot]) for n, plot in enumerate(plots)]
    with pytest.raises(TypeError, match=r"x\.png: .* expected plots of one kind"):
        build_report("Mixed", "", sections, [])
