"""What an evaluation may have found, made by hand."""

from __future__ import annotations

from pipelines.stages.evaluate.results import Curve, CurvePoint, Figure, Mark, MeasureResult, SampleText
from pipelines.stages.evaluate.stage import Evaluated, EvaluateOutput

TEXT = MeasureResult(
    name="text",
    kind="text",
    unit="document",
    num_units=10,
    figures=(
        Figure(name="bits_per_byte", value=1.456, low=1.404, high=1.508, unit="bits per byte", is_main=True),
        Figure(name="loss", value=3.21, low=3.1, high=3.32, unit="nats per token", is_main=True),
        Figure(name="perplexity", value=24.78, low=22.2, high=27.66, transform="exp", is_main=True),
    ),
    references=(
        Figure(name="gzip -9", value=2.111, unit="bits per byte"),
        Figure(name="untrained", value=3.789, unit="bits per byte"),
    ),
    notes=("On the validation split.",),
    units="units/text.npz",
)
POSITION = MeasureResult(
    name="position",
    kind="position",
    unit="document",
    num_units=7,
    figures=(Figure(name="loss_beyond", value=3.4, low=3.3, high=3.5, unit="nats per token"),),
    curves=(
        Curve(
            name="perplexity_by_position",
            title="Perplexity by position in the context",
            x_label="position (tokens)",
            y_label="perplexity",
            points=(CurvePoint(x=256, y=30.0, low=25.0, high=36.0), CurvePoint(x=1024, y=22.2)),
            mark=Mark(x=512, label="training length"),
            note="Mean over 16 stretches.",
        ),
    ),
)
SAMPLES = MeasureResult(
    name="samples",
    kind="samples",
    unit="text",
    num_units=1,
    samples=(SampleText(prompt="def ", text="f(x): return x < 1 & y"),),
)


def output(*results: MeasureResult) -> EvaluateOutput:
    """What was found about the final model of the stage `train`."""
    evaluated = Evaluated(stage="train", step=100, model="model")
    return EvaluateOutput(evaluated=evaluated, precision="fp32", results=results)


EVALUATION = output(TEXT, POSITION, SAMPLES)
