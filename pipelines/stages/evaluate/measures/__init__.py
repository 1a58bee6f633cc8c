"""The measures of the `evaluate` stage. A measure is a file here, and an entry below.

Settings, the default list, tasks, results, MLflow and the JSON schema follow from this one tuple.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipelines.stages.evaluate.measures.decoding import DecodingMeasure
from pipelines.stages.evaluate.measures.in_context import InContextMeasure
from pipelines.stages.evaluate.measures.measure import AnyMeasure, MeasureConfig
from pipelines.stages.evaluate.measures.position import PositionConfig, PositionMeasure
from pipelines.stages.evaluate.measures.recall import RecallMeasure
from pipelines.stages.evaluate.measures.samples import SamplesConfig, SamplesMeasure
from pipelines.stages.evaluate.measures.text import TextConfig, TextMeasure
from pipelines.stages.evaluate.measures.zero_shot import ZeroShotMeasure

MEASURES: tuple[AnyMeasure, ...] = (
    TextMeasure(),
    PositionMeasure(),
    InContextMeasure(),
    SamplesMeasure(),
    DecodingMeasure(),
    ZeroShotMeasure(),
    RecallMeasure(),
)

DEFAULT: tuple[MeasureConfig, ...] = (TextConfig(), PositionConfig(), SamplesConfig())
"""What is measured if a stage says nothing."""

if TYPE_CHECKING:
    AnyMeasureConfig = MeasureConfig
else:
    AnyMeasureConfig = Annotated[
        reduce(or_, (measure.config_type for measure in MEASURES)), Field(discriminator="kind")
    ]


def measure_of(config: MeasureConfig) -> AnyMeasure:
    """The measure that these settings are of."""
    return next(measure for measure in MEASURES if measure.kind == config.kind)
