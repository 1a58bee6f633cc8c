"""Speed of decoding and size of the state, by the position in the context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipelines.stages.evaluate.measures.measure import Measure, MeasureConfig, Setting, Task

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import Measured, TaskResult


class DecodingConfig(MeasureConfig):
    """Time one token after another. Alone in its stage it has the machine to itself."""

    kind: Literal["decoding"] = "decoding"
    positions: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (128, 1024, 4096), min_length=1, description="Tokens that were read before those that are timed."
    )
    rows: int = Field(1, ge=1, description="Sequences decoded side by side.")
    num_steps: int = Field(32, ge=2, description="Tokens of each sequence that are timed at each position.")


class DecodingMeasure(Measure[DecodingConfig]):
    """Of models of ours, exported or not: others have no state that could be asked for its size."""

    def figure_names(self, config: DecodingConfig, setting: Setting) -> frozenset[str]:
        """See Measure: two for each position."""
        return frozenset(
            f"{figure}_{position}" for figure in ("ms_per_token", "state_bytes") for position in config.positions
        )

    def tasks(self, config: DecodingConfig, setting: Setting) -> list[Task]:
        """One per position."""
        from pipelines.stages.evaluate.measures.decoding_work import TimeSteps

        return [
            Task(f"{position:09d}", TimeSteps(position, config.rows, config.num_steps), setting.config.resources)
            for position in dict.fromkeys(config.positions)
        ]

    def reduce(self, config: DecodingConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
        """Curves of both by position."""
        from pipelines.stages.evaluate.measures.decoding_work import measured

        return measured(config, results)
