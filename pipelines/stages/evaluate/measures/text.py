"""Loss, perplexity and bits per byte of whole validation documents, beside gzip and the untrained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.stages.evaluate.measures.measure import Measure, MeasureConfig, Setting, Task, Turn

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import Measured, TaskResult

_BATCHES_PER_TASK = 4
_TEXTS_PER_TASK = 64


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
    """Documents as they are packed, kept apart as in training; or as text, for a model with a tokenizer of its own."""

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
        from pipelines.stages.evaluate.measures.text_work import CompressDocuments, ScoreBatches, pieces_of_text

        tasks = []
        resources = setting.config.resources
        for source, node in enumerate(setting.tokens):
            rows = setting.config.rows(node.output.seq_len)
            num_samples = node.output.num_valid_samples
            if config.max_tokens is not None:
                num_samples = min(num_samples, -(-config.max_tokens // node.output.seq_len))
            baselines = self._baselines(config, setting)
            if "gzip -9" in baselines:
                gzip = CompressDocuments(source, num_samples)
                tasks.append(Task(f"{source}-gzip", gzip, resources.without_accelerators(), Turn.EARLY))
            if not setting.reads_ids:
                for texts in pieces_of_text(source, setting, num_samples, _TEXTS_PER_TASK):
                    tasks.append(Task(f"{source}-model-{texts.first:08d}", texts, resources))
                continue
            for untrained in (False, True) if "untrained" in baselines else (False,):
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

        return measured(config.called, setting, results, self._baselines(config, setting))

    @staticmethod
    def _baselines(config: TextConfig, setting: Setting) -> tuple[str, ...]:
        """What the model is compared with. Of a model from elsewhere it is not known what it was before training."""
        if not config.baselines or not setting.is_text:
            return ()
        return ("gzip -9", "untrained") if setting.reads_ids else ("gzip -9",)
