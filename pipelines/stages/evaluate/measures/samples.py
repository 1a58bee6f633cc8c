"""Text that the model generates, to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.stages.evaluate.measures.measure import Measure, MeasureConfig, Setting, Task, Turn

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import Measured, TaskResult


class SamplesConfig(MeasureConfig):
    """Text to generate from the model."""

    kind: Literal["samples"] = "samples"
    prompts: tuple[str, ...] = Field(("",), description="Beginnings the model continues; empty starts a new document.")
    max_new_tokens: int = Field(200, ge=1, description="Tokens to generate for each prompt.")
    temperature: float = Field(0.8, ge=0, description="Softmax temperature; 0 always takes the likeliest token.")
    top_k: int | None = Field(50, ge=1, description="Sample from the k likeliest tokens only; null: from all.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the likeliest tokens with this total probability."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of the sampling; on a GPU, where prompts are drawn together, of the first."
    )


class SamplesMeasure(Measure[SamplesConfig]):
    """One prompt per task; on a GPU all together."""

    def figure_names(self, config: SamplesConfig, setting: Setting) -> frozenset[str]:
        """None: texts are no figures."""
        return frozenset()

    def tasks(self, config: SamplesConfig, setting: Setting) -> list[Task]:
        """Long ones: a text is drawn token by token."""
        from pipelines.stages.evaluate.measures.samples_work import ContinueTexts

        if not setting.is_text:
            return []
        at_once = max(1, len(config.prompts)) if setting.config.on_gpu else 1
        drawing = config.model_dump(exclude={"kind", "name", "prompts"})
        return [
            Task(
                f"{first:05d}",
                ContinueTexts(config.prompts[first : first + at_once], drawing),
                setting.config.resources,
                Turn.EARLY,
            )
            for first in range(0, len(config.prompts), at_once)
        ]

    def reduce(self, config: SamplesConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
        """The texts, in the order of the prompts."""
        from pipelines.stages.evaluate.measures.samples_work import measured

        return measured(config.called, config.prompts, results)
