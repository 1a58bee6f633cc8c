"""The `report` stage: one page with the sections of the stages that it needs, and of those that these read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import Field
from rich.markup import escape

from pipelines.engine.runs import Run
from pipelines.engine.stage import AnyNode, Stage, StageContext, StageInputs, StageNode, StageOutput
from pipelines.errors import FieldError
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.ladder.stage import LadderStage
from pipelines.stages.report.config import ReportStageConfig
from pipelines.stages.train.stage import TrainStage
from pipelines.storage.artifact import ArtifactDir


class ReportOutput(StageOutput):
    """Files of the page, relative to the artifact."""

    html: str = Field("report.html")
    markdown: str = Field("report.md")
    data: str = Field("report.json", description="The figures of the page, for programs.")


@dataclass(frozen=True, kw_only=True)
class ReportInputs(StageInputs):
    """Inputs of a `report` stage: evaluations, the training of each evaluated model, and scaling ladders."""

    trained: tuple[StageNode[TrainStage], ...] = ()
    evaluated: tuple[StageNode[EvaluateStage], ...]
    ladders: tuple[StageNode[LadderStage], ...] = ()


class ReportStage(Stage[ReportStageConfig, ReportInputs, ReportOutput]):
    """Reads records, histories and the sums behind figures, so it takes some seconds."""

    code_version = 7
    uses_cluster = False

    def check(self, name: str, config: ReportStageConfig, inputs: ReportInputs) -> None:
        """Refuse an evaluation without the training of its model: the page shows both; and an unknown baseline."""
        trained = [train.name for train in inputs.trained]
        for evaluated in inputs.evaluated:
            train = evaluated.inputs.trained
            if train is not None and train.name not in trained:
                raise FieldError(
                    ("stages", name, "needs"),
                    f"has {evaluated.name!r} but not {train.name!r}, the train stage it evaluates. Add {train.name!r}.",
                )
        if config.baseline and config.baseline not in trained:
            raise FieldError(
                ("stages", name, "baseline"),
                f"found {config.baseline!r}, expected a train stage that the report needs: {', '.join(trained)}.",
            )

    def run(self, config: ReportStageConfig, inputs: ReportInputs, context: StageContext) -> ReportOutput:
        """Write the page and its plots, and tell the trackers of them."""
        from pipelines.stages.report.identity import run_identity
        from pipelines.stages.report.machine import COLUMNS
        from pipelines.stages.report.nodes import RunShare, content_of
        from pipelines.stages.report.page import PLOTS, build_report

        needed: tuple[AnyNode, ...] = (*inputs.trained, *inputs.evaluated, *inputs.ladders)
        run = None if context.run_id is None else run_identity(Run(context.artifact.storage, context.run_id))
        report = build_report(
            content_of(
                config.title or context.name,
                f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by stage {context.name} ({context.fingerprint[:8]}).",
                [RunShare(run, needed)],
                config.baseline,
            )
        )
        output = ReportOutput(html="report.html", markdown="report.md", data="report.json")
        report.write(context.artifact.local)
        for name in (output.html, output.markdown, output.data, PLOTS):
            context.artifact.publish(name)
            context.journal.log_artifact(name)
        context.journal.log_table("figures.json", COLUMNS, [[row[name] for name in COLUMNS] for row in report.rows])
        return output

    def headline(self, config: ReportStageConfig, output: ReportOutput, artifact: ArtifactDir) -> str:
        """The page's address."""
        return f"[bold]{escape(artifact.url)}/{output.html}[/]"
