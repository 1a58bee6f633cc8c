"""A kind of stage that the report does not know, with a section: the page shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

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
from pipelines.stages.evaluate.results import Curve, CurvePoint, Figure, MeasureResult, SampleText
from pipelines.stages.report.config import ReportStageConfig
from pipelines.stages.report.identity import RunIdentity
from pipelines.stages.report.nodes import RunShare, content_of, with_inputs
from pipelines.stages.report.stage import ReportInputs, ReportStage
from pipelines.stages.sections import Section, Table
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal, read_events


class RecallConfig(StageConfig):
    kind: Literal["recall"]
    api_key: str = "hunter22"


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
        points = (CurvePoint(x=1, y=1.0), CurvePoint(x=9, y=node.output.accuracy))
        result = MeasureResult(
            name="recall", kind="recall", unit="pair", num_units=100,
            figures=(Figure(name="recall", value=node.output.accuracy, better="higher", chance=0.1),),
            curves=(Curve(name="recall", title="Recall by distance", x_label="distance", y_label="", points=points),),
            samples=(SampleText(prompt="a1 b2 a", text="1"),),
            notes=("Recall is the share of pairs that are found again.",),
        )  # fmt: skip
        return Section(
            subject=node.name,
            results=[result],
            data=[Table(title="pairs", columns=("split", "pairs"), rows=[["all", "100"]])],
        )


def recall_node(name: str, accuracy: float, folder: Path, easier: AnyNode | None = None) -> AnyNode:
    result = StageResult(name.ljust(64, "0"), ArtifactDir.at(folder / name), RecallOutput(accuracy=accuracy))
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
    assert "| model | recall ↑ (chance 0.1) |" in page
    assert "| easy baseline | 0.97 |\n| hard | 0.42 |\n" in page
    assert page.count("share of pairs") == 1
    assert "### Recall by distance\n\n![Recall by distance against distance: easy, hard](plots/recall.png)\n" in page
    assert (artifact.local / "plots" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "hard:\n\n```text\na1 b2 a1\n```" in page
    assert "### hard (recall, fingerprint hard0000)" in page
    assert "api_key: '***'" in page
    assert "hunter22" not in page
    told = [event for event, _ in read_events(tmp_path / "report.jsonl")]
    assert [event["path"] for event in told if event["event"] == "artifact"] == [
        "report.html", "report.md", "report.json", "plots",
    ]  # fmt: skip
    (table,) = (event for event in told if event["event"] == "table")
    assert table["file"] == "figures.json"
    assert [row[table["columns"].index("value")] for row in table["rows"]] == [0.97, 0.42]
    assert [row["value"] for row in json.loads((artifact.local / "report.json").read_text())["results"]] == [0.97, 0.42]


def test_stages_come_after_what_they_read_and_once(tmp_path: Path) -> None:
    easy = recall_node("easy", 1.0, tmp_path)
    hard, other = (recall_node(name, 0.5, tmp_path, easy) for name in ("hard", "other"))
    assert [node.name for node in with_inputs([hard, easy, other])] == ["easy", "hard", "other"]


def test_models_of_several_runs_go_by_the_names_of_their_runs(tmp_path: Path) -> None:
    easy = recall_node("easy", 0.9, tmp_path)
    shares = [
        RunShare(RunIdentity("one-1"), [recall_node("hard", 0.4, tmp_path / "one", easy)], "one"),
        RunShare(RunIdentity("two-1"), [recall_node("single", 0.5, tmp_path / "two")], "two"),
    ]
    content = content_of("Two runs", "", shares)
    assert [section.subject for section in content.sections] == ["one/easy", "one/hard", "two"]
    assert [table.title for section in content.sections for table in section.data] == [
        "one/pairs", "one/pairs", "two/pairs",
    ]  # fmt: skip
    assert [stage.name for stage in content.stages] == ["one/easy", "one/hard", "two/single"]
    assert [run.run_id for run in content.runs] == ["one-1", "two-1"]


def test_a_stage_that_two_runs_share_is_told_once(tmp_path: Path) -> None:
    hard = recall_node("hard", 0.4, tmp_path)
    shares = [RunShare(None, [hard], label) for label in ("one", "two")]
    content = content_of("", "", shares)
    assert [(section.subject, len(section.data)) for section in content.sections] == [("one", 1), ("two", 0)]
    assert [stage.name for stage in content.stages] == ["one/hard"]
