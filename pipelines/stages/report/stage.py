"""The `report` stage: one page about the models that were trained and evaluated."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from pydantic import Field

from pipelines.engine.stage import StageContext, StageInput, StageOutput
from pipelines.stages.numbers import perplexity
from pipelines.stages.report.config import ReportStageConfig


class ReportOutput(StageOutput):
    """Where the page is, relative to the artifact."""

    html: str = Field("report.html")
    markdown: str = Field("report.md")


class ReportStage:
    """Reads records and training histories only, so it runs in the driver in a second or two."""

    kind: ClassVar[str] = "report"
    code_version: ClassVar[int] = 2
    output_type: ClassVar[type[StageOutput]] = ReportOutput

    def content_identity(self, config: ReportStageConfig) -> None:
        """All it reads are other stages' artifacts."""

    def run(self, config: ReportStageConfig, context: StageContext) -> ReportOutput:
        """Write report.html, report.md and the plots."""
        from pipelines.stages.report.page import StageSummary, build_report

        trained = {stage.name: stage for stage in context.inputs_of("train")}
        models = [_results(evaluated, trained) for evaluated in context.inputs_of("evaluate")]
        stages = [
            StageSummary(stage.name, stage.kind, stage.fingerprint, stage.config.model_dump(mode="json"))
            for stage in context.inputs.values()
        ]
        about = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by stage {context.name} ({context.fingerprint[:8]})."
        report = build_report(config.title or context.name, about, models, stages, _data(context))
        output = ReportOutput(html="report.html", markdown="report.md")
        files = {output.html: report.html.encode(), output.markdown: report.markdown.encode(), **report.pictures}
        for name, content in files.items():
            (context.artifact.local / name).write_bytes(content)
            context.artifact.publish(name)
            context.journal.log_artifact(name)
        return output


def _data(context: StageContext) -> list[str]:
    """A line about the documents of each tokenize stage behind an evaluated model."""
    tokens = {
        stage.name: stage.output.summary()
        for evaluated in context.inputs_of("evaluate")
        for stage in evaluated.inputs.values()
        if stage.kind == "tokenize"
    }
    return [f"{name}: {summary}." for name, summary in tokens.items()]


def _results(evaluated: StageInput, trained: dict[str, StageInput]) -> Any:
    from pipelines.stages.report.page import ModelResults

    figures: Any = evaluated.output
    (train,) = (trained[name] for name in evaluated.config.needs if name in trained)
    facts: Any = train.output
    config: Any = train.config
    train.artifact.fetch("history.json")
    history = {
        name: [(int(step), float(value)) for step, value in points]
        for name, points in train.artifact.read_json("history.json").items()
    }
    return ModelResults(
        name=train.name,
        mixers=config.model.pattern,
        num_params=facts.num_params,
        tokens_seen=facts.tokens_seen,
        tokens_per_s=facts.tokens_per_s,
        mfu=facts.mfu,
        seq_len=figures.seq_len,
        loss=figures.loss,
        perplexity=figures.perplexity,
        bits_per_byte=figures.bits_per_byte,
        untrained_bits_per_byte=figures.untrained_bits_per_byte,
        gzip_bits_per_byte=figures.gzip_bits_per_byte,
        position_perplexity=[
            (end, perplexity(loss)) for end, loss in zip(figures.position_bin_ends, figures.position_loss, strict=True)
        ],
        num_windows=figures.num_windows,
        samples=[(sample.prompt, sample.text) for sample in figures.samples],
        history=history,
    )
