"""The `report` stage: one page with the sections of the stages that it needs, and of those that these read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import Field
from rich.markup import escape

from pipelines.engine.graph import nodes_by_role
from pipelines.engine.stage import AnyNode, Stage, StageContext, StageInputs, StageNode, StageOutput
from pipelines.errors import FieldError
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.report.config import ReportStageConfig
from pipelines.stages.sections import Reported
from pipelines.stages.train.stage import TrainStage
from pipelines.storage.artifact import ArtifactDir


class ReportOutput(StageOutput):
    """Files of the page, relative to the artifact."""

    html: str = Field("report.html")
    markdown: str = Field("report.md")


@dataclass(frozen=True, kw_only=True)
class ReportInputs(StageInputs):
    """Inputs of a `report` stage: evaluations, and the training of each evaluated model."""

    trained: tuple[StageNode[TrainStage], ...] = ()
    evaluated: tuple[StageNode[EvaluateStage], ...]


class ReportStage(Stage[ReportStageConfig, ReportInputs, ReportOutput]):
    """Reads records and training histories only, so it takes a second or two."""

    code_version = 2
    uses_cluster = False

    def check(self, name: str, config: ReportStageConfig, inputs: ReportInputs) -> None:
        """Refuse an evaluation without the training of its model: the page shows both."""
        trained = {train.name for train in inputs.trained}
        for evaluated in inputs.evaluated:
            train = evaluated.inputs.trained
            if train is not None and train.name not in trained:
                raise FieldError(
                    ("stages", name, "needs"),
                    f"has {evaluated.name!r} but not {train.name!r}, the train stage it evaluates. Add {train.name!r}.",
                )

    def run(self, config: ReportStageConfig, inputs: ReportInputs, context: StageContext) -> ReportOutput:
        """Write report.html, report.md and the plots."""
        from pipelines.stages.report.page import StageSummary, build_report

        needed: tuple[AnyNode, ...] = (*inputs.trained, *inputs.evaluated)
        stages = [
            StageSummary(
                node.name,
                node.stage.kind,
                node.fingerprint,
                node.config.model_dump(mode="json"),
                is_open=not isinstance(node.stage, Reported),  # the settings behind the results
            )
            for node in needed
        ]
        report = build_report(
            title=config.title or context.name,
            about=f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by stage {context.name} "
            f"({context.fingerprint[:8]}).",
            sections=[node.stage.section(node) for node in with_inputs(needed) if isinstance(node.stage, Reported)],
            stages=stages,
        )
        output = ReportOutput(html="report.html", markdown="report.md")
        files = {output.html: report.html.encode(), output.markdown: report.markdown.encode(), **report.pictures}
        for name, content in files.items():
            (context.artifact.local / name).write_bytes(content)
            context.artifact.publish(name)
            context.journal.log_artifact(name)
        return output

    def headline(self, config: ReportStageConfig, output: ReportOutput, artifact: ArtifactDir) -> str:
        """The page's address."""
        return f"[bold]{escape(artifact.url)}/{output.html}[/]"


def with_inputs(nodes: Iterable[AnyNode]) -> list[AnyNode]:
    """The nodes, each once and after all that it reads."""
    found: dict[str, AnyNode] = {}
    for node in nodes:
        read = (one for group in nodes_by_role(node).values() for one in group)
        found |= {one.name: one for one in (*with_inputs(read), node) if one.name not in found}
    return list(found.values())
