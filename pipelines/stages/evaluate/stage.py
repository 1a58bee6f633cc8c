"""The `evaluate` stage: how good a trained model is, by a list of measures, and what it writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from base.errors import UserError
from base.names import suggest
from pipelines.engine.stage import (
    ClosedGate,
    Content,
    Facts,
    ProgressMetrics,
    Stage,
    StageContext,
    StageInputs,
    StageNode,
    StageOutput,
)
from pipelines.errors import FieldError
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.measures import measure_of
from pipelines.stages.evaluate.measures.measure import Setting
from pipelines.stages.evaluate.results import Figure, MeasureResult
from pipelines.stages.evaluate.section import evaluated_section
from pipelines.stages.numbers import with_interval
from pipelines.stages.sections import Section
from pipelines.stages.tasks import user_errors
from pipelines.stages.tokenize.stage import TokenizeStage
from pipelines.stages.train.layout import complete_steps
from pipelines.stages.train.stage import TrainStage, check_same_form
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    from pipelines.stages.evaluate.subject import Subject

_MODEL = "the model from elsewhere"  # in the content; no measure can have this name
_UNNAMED = "text"  # the kind of measure whose figures are called eval/loss, not eval/text/loss


class Evaluated(Facts):
    """What was evaluated."""

    stage: str | None = Field(description="The stage that trained it; null: no stage of this pipeline did.")
    step: int | None = Field(description="Steps it was trained for; null: not known.")
    model: str = Field(description="Folder of the model in that stage's artifact, or its name elsewhere.")


class EvaluateOutput(StageOutput):
    """What the measures found about one model."""

    evaluated: Evaluated
    precision: Literal["fp32", "bf16"] = Field(description="What the model computed in.")
    results: tuple[MeasureResult, ...] = Field(description="One per measure, in the order of the settings.")

    def result(self, measure: str) -> MeasureResult | None:
        """What the measure of that name found."""
        return next((result for result in self.results if result.name == measure), None)

    def figure(self, path: str) -> Figure | None:
        """A figure by the name of its measure and its own, such as `text/loss`."""
        measure, _, name = path.partition("/")
        result = self.result(measure)
        return None if result is None else result.figure(name)

    def figures(self) -> dict[str, float]:
        """Under their names in MLflow, with the ends of their intervals; and what they are compared with.

        Those of the measure `text` are called eval/loss, eval/untrained_bits_per_byte, those of others
        eval/<measure>/<figure>.
        """
        found: dict[str, float] = {}
        for result in self.results:
            prefix = "eval/" if result.name == _UNNAMED else f"eval/{result.name}/"
            for figure in result.figures:
                values = {"": figure.value, "_low": figure.low, "_high": figure.high}
                found |= {f"{prefix}{figure.name}{end}": value for end, value in values.items() if value is not None}
                if figure.chance is not None:
                    found[f"{prefix}chance_{figure.name}"] = figure.chance
            for reference, figure in _compared(result):
                found[f"{prefix}{_slug(reference.name)}_{figure.name}"] = reference.value
        return found

    def summary(self) -> str | None:
        """The main figures with their intervals, and on how many units."""
        of_measures = [
            "; ".join([_figure_in_words(result, figure) for figure in _main(result)]) + _on_units(result)
            for result in self.results
            if _main(result)
        ]
        return "; ".join(of_measures) or None

    def headline(self) -> str:
        """The same as console markup, beside what they are compared with."""
        parts: list[str] = []
        for result in self.results:
            for figure in _main(result):
                words, beside = _figure_in_words(result, figure), _beside(result, figure)
                parts.append((words if parts else f"[bold]{words}[/]") + beside)
            if _main(result):
                parts[-1] += _on_units(result)
        return ", ".join(parts)


def _main(result: MeasureResult) -> list[Figure]:
    return [figure for figure in result.figures if figure.is_main]


def _on_units(result: MeasureResult) -> str:
    return f", on {result.num_units:,} {result.unit}{'' if result.num_units == 1 else 's'}"


def _beside(result: MeasureResult, figure: Figure) -> str:
    """What a figure is compared with, in brackets, if there is something."""
    beside = [f"{found.name} {found.value:.3f}" for found, of in _compared(result) if of is figure]
    if figure.chance is not None:
        beside.append(f"chance {figure.chance:.1%}")
    return f" ({', '.join(beside)})" if beside else ""


def _figure_in_words(result: MeasureResult, figure: Figure) -> str:
    name = figure.name.replace("_", " ")
    if result.name != result.kind or result.kind != _UNNAMED:
        name = f"{result.name} {name}"
    value = with_interval(figure.value, figure.low, figure.high)
    if figure.unit == name:
        return f"{value} {name}"
    return f"{name} {value}{f' {figure.unit}' if figure.unit else ''}"


def _compared(result: MeasureResult) -> Iterator[tuple[Figure, Figure]]:
    """Each reference with the figure that it is compared with: the first in its unit."""
    for reference in result.references:
        figure = next((figure for figure in result.figures if figure.unit == reference.unit), None)
        if figure is not None:
            yield reference, figure


def _slug(label: str) -> str:
    """`gzip` of `gzip -9`."""
    return re.sub(r"[^a-z]+", "_", label.lower()).strip("_")


@dataclass(frozen=True, kw_only=True)
class EvaluateInputs(StageInputs):
    """Inputs of an `evaluate` stage: a model, and the texts to evaluate it on, together and one by one."""

    trained: StageNode[TrainStage] | None = None
    tokens: tuple[StageNode[TokenizeStage], ...]


class EvaluateStage(Stage[EvaluateStageConfig, EvaluateInputs, EvaluateOutput]):
    """Spread over Ray actors. Results of finished tasks are kept between attempts."""

    code_version = 3
    progress = ProgressMetrics("evaluate/tasks_total", {})

    def mark(self, config: EvaluateStageConfig, artifact: ArtifactDir) -> int:
        """Number of tasks whose results are kept."""
        return sum(len(artifact.listdir(f"tasks/{measure.called}")) for measure in config.measures)

    def check(self, name: str, config: EvaluateStageConfig, inputs: EvaluateInputs) -> None:
        """Refuse tokens without a validation split, a step that is never reached, and what measures refuse."""
        if (inputs.trained is None) == (config.model is None):
            found = "no stage of kind train, and there is no `model`" if config.model is None else "a train stage too"
            raise FieldError(
                ("stages", name, "needs" if config.model is None else "model"),
                f"{found}: expected one of them, whose model is evaluated. "
                f"{'Add one' if config.model is None else 'Remove one'}.",
            )
        for tokens in inputs.tokens:
            if not tokens.config.validation_fraction:
                raise FieldError(
                    ("stages", tokens.name, "validation_fraction"),
                    f"is 0, so {name!r} has nothing to evaluate on. Set it above 0 (0.01 keeps a hundredth of the "
                    "documents).",
                )
        for other in inputs.tokens[1:]:
            check_same_form(name, inputs.tokens[0], other)
        setting = _setting(name, config, inputs)
        if config.step is not None:
            _check_step(name, config.step, inputs.trained, setting)
        if config.model is not None and not setting.is_text:
            raise FieldError(
                ("stages", name, "model"),
                "reads text with its own tokenizer, and the tokens of this stage are no text. Name a tokenize stage of "
                "text in `needs`.",
            )
        for number, measure in enumerate(config.measures):
            try:
                measure_of(measure).check(measure, setting)
            except FieldError as error:
                raise FieldError(("stages", name, "measures", str(number), *error.field), error.problem) from None
        _check_gate(name, config, setting)

    def content_identity(self, config: EvaluateStageConfig) -> Content | None:
        """Digests of what measures read, by measure and what it is; and the version of a model from elsewhere."""
        found: dict[str, str] = {}
        if config.model is not None:
            with user_errors():
                found[_MODEL] = config.model.version()
        for measure in config.measures:
            content = measure_of(measure).content(measure)
            if isinstance(content, str):
                found[measure.called] = content
            elif content is not None:
                found |= {f"{measure.called} {name}": digest for name, digest in content.items()}
        return found or None

    def local_paths(self, config: EvaluateStageConfig) -> Sequence[str]:
        """Files that measures read, and the folder of a model from elsewhere."""
        model = [] if config.model is None or config.model.folder is None else [config.model.name]
        return [*model, *(path for measure in config.measures for path in measure_of(measure).local_paths(measure))]

    def run(self, config: EvaluateStageConfig, inputs: EvaluateInputs, context: StageContext) -> EvaluateOutput:
        """Do the tasks of all measures that are not done yet. Raises UserError: the step is not kept."""
        from pipelines.stages.evaluate.evaluation import evaluate

        subject, evaluated = _subject(config, inputs, context)
        for tokens in inputs.tokens:
            assert tokens.output.valid_sha256 is not None, "check() refuses a tokenize stage without a validation split"
            context.journal.log_dataset(tokens.name, tokens.output.valid_sha256, tokens.artifact.url, context="eval")
        results = evaluate(_setting(context.name, config, inputs), subject, context.artifact, context.journal)
        output = EvaluateOutput(
            evaluated=evaluated,
            precision=config.used_precision,
            results=results,
        )
        context.artifact.write_json("results.json", output.model_dump(mode="json"))
        context.journal.log_metrics(0, output.figures())
        context.journal.log_artifact("results.json")
        return output

    def closed_gate(self, config: EvaluateStageConfig, output: EvaluateOutput) -> ClosedGate | None:
        """Compare the figures with the bounds in `gate`."""
        if config.gate is None:
            return None
        reason = config.gate.reason({path: output.figure(path) for path in config.gate.figures})
        return None if reason is None else ClosedGate(reason, fails=config.gate.action == "fail")

    def section(self, node: StageNode[Self]) -> Section:
        """What was found about the model."""
        return evaluated_section(node)

    def headline(self, config: EvaluateStageConfig, output: EvaluateOutput, artifact: ArtifactDir) -> str | None:
        """The main figures with their intervals, beside what they are compared with."""
        return output.headline() or None


def _check_gate(name: str, config: EvaluateStageConfig, setting: Setting) -> None:
    """Refuse bounds for figures that will not be found. Raises FieldError."""
    figures = {measure.called: measure_of(measure).figure_names(measure, setting) for measure in config.measures}
    for path in config.gate.figures if config.gate else ():
        measure, _, figure = path.partition("/")
        field = ("stages", name, "gate", "figures", path)
        if measure not in figures:
            raise FieldError(field, f"there is no measure {measure!r}.{suggest(measure, list(figures))}")
        known = figures[measure]
        if known is not None and figure not in known:
            paths = [f"{measure}/{one}" for one in sorted(known)]
            raise FieldError(field, f"measure {measure!r} finds no such figure.{suggest(path, paths)}")


def _setting(name: str, config: EvaluateStageConfig, inputs: EvaluateInputs) -> Setting:
    return Setting(config=config, stage=name, tokens=inputs.tokens, trained=inputs.trained)


def _subject(config: EvaluateStageConfig, inputs: EvaluateInputs, context: StageContext) -> tuple[Subject, Evaluated]:
    """The model that is evaluated, and what the record says of it. Raises UserError: the step is not kept."""
    from pipelines.stages.evaluate.subject import ExternalModel, TrainedModel

    if config.model is not None:
        assert isinstance(context.content, dict), "content_identity() tells the model's version"
        version = context.content[_MODEL]
        of_hub = "" if config.model.folder is not None else f"@{version}"
        evaluated = Evaluated(stage=None, step=None, model=f"{config.model.name}{of_hub}")
        return ExternalModel(config.model, version), evaluated
    trained = inputs.trained
    assert trained is not None, "check() refuses an evaluation without a model"
    step = _kept_step(context.name, config.step, trained)
    return (
        TrainedModel(trained.artifact, trained.output.model, step),
        Evaluated(stage=trained.name, step=step or trained.output.steps, model=trained.output.model),
    )


def _check_step(name: str, step: int, trained: StageNode[TrainStage] | None, setting: Setting) -> None:
    if trained is None:
        raise FieldError(("stages", name, "step"), "is of a train stage, and `model` names another one. Remove it.")
    last = trained.config.num_steps(setting.training_seq_len)
    if step > last:
        raise FieldError(
            ("stages", name, "step"),
            f"found {step}, but {trained.name!r} trains for {last} steps. Leave it out for the final model.",
        )


def _kept_step(name: str, step: int | None, trained: StageNode[TrainStage]) -> int | None:
    """The checkpoint to load; None: the final model. Raises UserError: there is none of this step."""
    if step is None or step == trained.output.steps:
        return None
    kept = complete_steps(trained.artifact)
    if step not in kept:
        steps = ", ".join(map(str, sorted(kept))) or "none"
        raise UserError(
            f"stages.{name}.step: found {step}, but stage {trained.name!r} keeps no checkpoint of that step. It keeps: "
            f"{steps}; its final model is that of step {trained.output.steps}. Give one of these; "
            f"{trained.name}.keep_checkpoints says how many are kept."
        )
    return step
