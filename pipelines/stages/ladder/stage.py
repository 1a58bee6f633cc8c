"""The `ladder` stage: the losses of several sizes as a law of their compute, and what larger sizes would reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import Field

from bmojo.counting import count
from pipelines.engine.stage import Facts, Stage, StageContext, StageInputs, StageNode, StageOutput
from pipelines.errors import FieldError
from pipelines.stages.evaluate.stage import EvaluateStage
from pipelines.stages.ladder.config import LadderStageConfig, Target
from pipelines.stages.sections import FittedLaw, LawPoint, Section, Table
from pipelines.stages.train.stage import TrainStage
from pipelines.storage.artifact import ArtifactDir

FEWEST = 4


class Interval(Facts):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


class LadderPoint(Facts):
    """One training."""

    name: str
    flops: float
    loss: float
    num_params: int
    tokens: int


class Prediction(Facts):
    """The loss of a size that was asked for, or of the largest one from the others."""

    name: str
    flops: float
    loss: Interval = Field(description="Of one training with so many FLOPs.")
    measured: float | None = Field(None, description="Of that training, if it is there.")


class CurvePoint(Facts):
    """The law itself at some FLOPs."""

    flops: float
    loss: Interval


class LadderOutput(StageOutput):
    """The fitted law L(C) = E + A C^-alpha, C in FLOPs, L in nats per token."""

    points: tuple[LadderPoint, ...]
    measured_by: str = Field(description="Where the losses come from.")
    problem: str | None = Field(description="Why there is no law; null: there is one.")
    floor: Interval | None = Field(None, description="E.")
    exponent: Interval | None = Field(None, description="alpha.")
    noise: float | None = Field(None, description="Relative deviation of a training from the law.")
    predictions: tuple[Prediction, ...] = ()
    check: Prediction | None = Field(None, description="The largest size, as the others predict it.")
    curve: tuple[CurvePoint, ...] = ()

    def summary(self) -> str | None:
        """The exponent, or why there is none."""
        return f"no law: {self.problem}" if self.exponent is None else f"exponent {self.exponent}"

    def figures(self) -> dict[str, float]:
        """For comparisons of runs, and MLflow."""
        found = {f"ladder/predicted/{one.name}": one.loss.value for one in self.predictions}
        if self.exponent is not None and self.floor is not None:
            found |= {"ladder/exponent": self.exponent.value, "ladder/floor": self.floor.value}
        return found


@dataclass(frozen=True)
class LadderInputs(StageInputs):
    """Inputs of a `ladder` stage. `evaluated`: evaluations of all of the models, whose losses count then."""

    trained: tuple[StageNode[TrainStage], ...]
    evaluated: tuple[StageNode[EvaluateStage], ...] = ()


class LadderStage(Stage[LadderStageConfig, LadderInputs, LadderOutput]):
    """Reads records only, so it takes a second."""

    code_version = 1
    uses_cluster = False

    def check(self, name: str, config: LadderStageConfig, inputs: LadderInputs) -> None:
        """Refuse too few sizes, and evaluations of only some of them."""
        if len(inputs.trained) < FEWEST:
            raise FieldError(
                ("stages", name, "needs"),
                f"found {len(inputs.trained)} train stages, expected {FEWEST} or more of different compute: a law has "
                'three parameters. A `foreach` over models makes them, and `needs: ["train[*]"]` reads them all.',
            )
        if not inputs.evaluated:
            return
        trained = [node.name for node in inputs.trained]
        judged = [node.inputs.trained.name for node in inputs.evaluated if node.inputs.trained is not None]
        if sorted(trained) != sorted(judged):
            missing = sorted({*trained} - {*judged})
            raise FieldError(
                ("stages", name, "needs"),
                f"has evaluations of {len(set(judged))} of {len(trained)} models"
                f"{f'; without: {chr(44).join(missing)}' if missing else ''}. Name one of each, or none: then the "
                "validation losses of training count.",
            )

    def run(self, config: LadderStageConfig, inputs: LadderInputs, context: StageContext) -> LadderOutput:
        """Fit, predict and draw."""
        from pipelines.stages.ladder.fitting import fitted_output
        from pipelines.stages.report.fit_plots import draw_law

        points, measured_by = _points(inputs)
        output = fitted_output(points, measured_by, _targets(config, inputs))
        picture = draw_law(law_of(context.name, output))
        for name, data in (("ladder.svg", picture.svg.encode()), ("ladder.png", picture.png)):
            (context.artifact.local / name).write_bytes(data)
            context.artifact.publish(name)
            context.journal.log_artifact(name)
        context.journal.log_metrics(0, output.figures())
        return output

    def headline(self, config: LadderStageConfig, output: LadderOutput, artifact: ArtifactDir) -> str | None:
        """What was predicted."""
        if output.problem is not None:
            return f"no law: {output.problem}"
        said = [f"{one.name}: loss {one.loss}" for one in output.predictions]
        return "; ".join(said) or output.summary()

    def section(self, node: StageNode[Self]) -> Section:
        """Its plot and its figures."""
        output = node.output
        return Section(laws=[law_of(node.name, output)])


def _points(inputs: LadderInputs) -> tuple[list[LadderPoint], str]:
    losses: dict[str, float] = {}
    for evaluated in inputs.evaluated:
        trained = evaluated.inputs.trained
        figure = next(
            (one for result in evaluated.output.results if (one := result.figure("loss")) and one.is_main), None
        )
        if trained is not None and figure is not None:
            losses[trained.name] = figure.value
    by_evaluation = len(losses) == len(inputs.trained)
    points = []
    for node in inputs.trained:
        output = node.output
        loss = losses[node.name] if by_evaluation else output.final_valid_loss
        flops = count(node.config.model.with_vocab_size(output.vocab_size), output.seq_len).train_flops_per_token
        points.append(
            LadderPoint(
                name=node.name,
                flops=flops * output.tokens_seen,
                loss=output.final_train_loss if loss is None else loss,
                num_params=output.num_params,
                tokens=output.tokens_seen,
            )
        )
    if by_evaluation:
        return points, "evaluation"
    has_validation = all(node.output.final_valid_loss is not None for node in inputs.trained)
    return points, "validation at the end of training" if has_validation else "training, for want of a validation split"


def _targets(config: LadderStageConfig, inputs: LadderInputs) -> list[tuple[str, float]]:
    first = inputs.trained[0].output
    return [_target(target, first.vocab_size, first.seq_len) for target in config.predict]


def _target(target: Target, vocab_size: int, seq_len: int) -> tuple[str, float]:
    if target.flops is not None:
        return f"{target.flops:.3g} FLOPs", target.flops
    assert target.model is not None
    assert target.max_tokens is not None
    model = target.model if target.model.vocab_size is not None else target.model.with_vocab_size(vocab_size)
    counts = count(model, seq_len)
    return (
        f"{counts.num_params / 1e6:,.1f}M on {target.max_tokens / 1e6:,.0f}M tokens",
        counts.train_flops_per_token * target.max_tokens,
    )


def law_of(name: str, output: LadderOutput) -> FittedLaw:
    """What the report shows of it."""
    predicted = [
        LawPoint(one.name, one.flops, one.loss.value, one.loss.low, one.loss.high) for one in output.predictions
    ]
    rows = [
        [
            one.name,
            f"{one.num_params / 1e6:,.2f} M",
            f"{one.tokens / 1e6:,.2f} M",
            f"{one.flops:.3g}",
            f"{one.loss:.4f}",
        ]
        for one in output.points
    ]
    rows += [[f"predicted: {one.name}", "", "", f"{one.flops:.3g}", str(one.loss)] for one in output.predictions]
    return FittedLaw(
        name=name,
        points=[LawPoint(one.name, one.flops, one.loss) for one in output.points],
        curve=[LawPoint("", one.flops, one.loss.value, one.loss.low, one.loss.high) for one in output.curve],
        predicted=predicted,
        table=Table(
            title=name,
            columns=("size", "parameters", "tokens", "FLOPs", "loss"),
            rows=rows,
            notes=list(_notes(output)),
        ),
    )


def _notes(output: LadderOutput) -> Sequence[str]:
    if output.exponent is None or output.floor is None or output.noise is None:
        return [f"There is no law: {output.problem}", f"Losses are those of {output.measured_by}."]
    notes = [
        f"L(C) = E + A C^-alpha in nats per token: E = {output.floor}, alpha = {output.exponent}. A training deviates "
        f"from it by {output.noise:.2%}. Losses are those of {output.measured_by}.",
        "In brackets 95 % intervals, of predictions for one training. They hold if the law does.",
    ]
    check = output.check
    if check is not None and check.measured is not None:
        holds = check.loss.low <= check.measured <= check.loss.high
        notes.append(
            f"{check.name} is predicted by the smaller ones as {check.loss}, and has {check.measured:.4g}: "
            f"{'within' if holds else 'outside'} the interval."
        )
    return notes
