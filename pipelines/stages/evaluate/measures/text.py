"""Loss, perplexity and bits per byte of whole validation documents, beside gzip and the untrained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.stages.evaluate.measures.measure import Measure, MeasureConfig, Setting, Task, Turn

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import Measured, TaskResult

_BATCHES_PER_TASK = 4


class TextConfig(MeasureConfig):
    """Score the documents of the validation split; of a task, the answers that are right."""

    kind: Literal["text"] = "text"
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Score at most about this many validation tokens of each text (whole sequences); null: all.",
    )
    baselines: bool = Field(True, description="Also score gzip -9 and the untrained model on the same documents.")


class TextMeasure(Measure[TextConfig]):
    """Documents as they are packed, kept apart as in training."""

    def figure_names(self, config: TextConfig, setting: Setting) -> frozenset[str]:
        """See Measure."""
        names = {"loss", "perplexity"}
        names |= {"bits_per_byte"} if setting.is_text else set()
        names |= {"accuracy"} if setting.has_loss_mask else set()
        if len(setting.tokens) > 1:
            names |= {f"{name}/{node.name}" for name in names for node in setting.tokens}
        return frozenset(names)

    def tasks(self, config: TextConfig, setting: Setting) -> list[Task]:
        """Batches, some at a time, of the model and of the untrained one; and gzip, which needs no accelerator."""
        from pipelines.stages.evaluate.measures.text_work import CompressDocuments, ScoreBatches

        tasks = []
        resources = setting.config.resources
        for source, node in enumerate(setting.tokens):
            rows = setting.config.rows(node.output.seq_len)
            num_samples = node.output.num_valid_samples
            if config.max_tokens is not None:
                num_samples = min(num_samples, -(-config.max_tokens // node.output.seq_len))
            if self._has_baselines(config, setting):
                gzip = CompressDocuments(source, num_samples)
                tasks.append(Task(f"{source}-gzip", gzip, resources.without_accelerators(), Turn.EARLY))
            for untrained in (False, True) if self._has_baselines(config, setting) else (False,):
                turn = Turn.LATE if untrained else Turn.ANY
                for start in range(0, num_samples, rows * _BATCHES_PER_TASK):
                    stop = min(start + rows * _BATCHES_PER_TASK, num_samples)
                    work = ScoreBatches(source, untrained, rows, start, stop, setting.has_loss_mask)
                    key = f"{source}-{'untrained' if untrained else 'model'}-{start:08d}"
                    tasks.append(Task(key, work, resources, turn))
        return tasks

    def reduce(self, config: TextConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
        """Sums of each document, and the figures."""
        from pipelines.stages.evaluate.measures.text_work import measured

        return measured(config.called, setting, results, self._has_baselines(config, setting))

    @staticmethod
    def _has_baselines(config: TextConfig, setting: Setting) -> bool:
        return config.baselines and setting.is_text
