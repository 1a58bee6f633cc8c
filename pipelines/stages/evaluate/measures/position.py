"""Loss by the position in the context, to any multiple of the training length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.stages.evaluate.measures.measure import Measure, MeasureConfig, Setting, Task

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import Measured, TaskResult


class PositionConfig(MeasureConfig):
    """Score long stretches of text, each begun with an empty memory."""

    kind: Literal["position"] = "position"
    multiple: int = Field(4, ge=1, le=4096, description="Positions go up to this many times the training length.")
    max_windows: int = Field(16, ge=1, description="Stretches of the text, at most, that are scored.")
    packed: bool = Field(
        False,
        description="false: each stretch lies within one document; `multiple` is lowered to what the longest document "
        "allows. true: stretches hold several documents, kept apart as in training.",
    )


class PositionMeasure(Measure[PositionConfig]):
    """None of a task, in which only answers count, and of a model with a tokenizer of its own."""

    def figure_names(self, config: PositionConfig, setting: Setting) -> frozenset[str]:
        """See Measure. `loss_beyond` is missing if no document is longer than the training length."""
        if setting.has_loss_mask or not setting.reads_ids:
            return frozenset()
        return frozenset({"loss_within", "loss_beyond"} if config.multiple > 1 else {"loss_within"})

    def tasks(self, config: PositionConfig, setting: Setting) -> list[Task]:
        """Stretches, one at a time on the CPU; on a GPU as many as fill it."""
        from pipelines.stages.evaluate.measures.position_work import ScoreWindows, plan_windows

        windows = plan_windows(config, setting)
        if windows is None:
            return []
        at_once = setting.config.long_rows(windows.num_tokens)
        tasks = []
        for source, starts in windows.starts:
            for first in range(0, len(starts), at_once):
                some = tuple(starts[first : first + at_once])
                work = ScoreWindows(source, some, windows.num_tokens, windows.bin_ends, config.packed)
                tasks.append(Task(f"{source}-{first:06d}", work, setting.config.resources))
        return tasks

    def reduce(self, config: PositionConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
        """The curve, and the loss within and beyond the training length."""
        from pipelines.stages.evaluate.measures.position_work import measured

        return measured(config, setting, results)
