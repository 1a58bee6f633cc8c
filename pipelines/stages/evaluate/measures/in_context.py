"""Learning in context: how much better the model predicts a document the more of it it has read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from pipelines.stages.evaluate.measures.measure import Measure, MeasureConfig, Setting, Task

if TYPE_CHECKING:
    from pipelines.stages.evaluate.measures.measure import Measured, TaskResult


class InContextConfig(MeasureConfig):
    """Score the beginnings of long documents, token by token.

    The score is the loss at the 500th token minus that at the 50th, averaged over documents (Olsson et al., In-context
    Learning and Induction Heads, arXiv:2209.11895). A model that uses what it has read has a score below 0.
    """

    kind: Literal["in_context"] = "in_context"
    num_tokens: int | None = Field(
        None,
        ge=2,
        description="Tokens of each document that are scored; shorter documents are left out. null: the training "
        "length, and at least `late`.",
    )
    max_documents: int = Field(256, ge=1, description="Documents, at most, that are scored.")
    early: int = Field(50, ge=1, description="The score is the loss at the token `late`, from 1, minus that at this.")
    late: int = Field(500, ge=2, description="See `early`.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.early >= self.late:
            raise ValueError(f"found early={self.early} and late={self.late}: early must be less than late.")
        if self.num_tokens is not None and self.num_tokens < self.late:
            raise ValueError(
                f"found num_tokens={self.num_tokens}, which does not reach late={self.late}. Lower `late`."
            )
        return self

    def length(self, training_seq_len: int) -> int:
        """Tokens of each document that are scored."""
        return self.num_tokens or max(training_seq_len, self.late)


class InContextMeasure(Measure[InContextConfig]):
    """None of a task, nor of a model with a tokenizer of its own."""

    def figure_names(self, config: InContextConfig, setting: Setting) -> frozenset[str]:
        """See Measure. Nothing is found if no document is long enough."""
        return frozenset({"score"} if setting.reads_ids and not setting.has_loss_mask else ())

    def tasks(self, config: InContextConfig, setting: Setting) -> list[Task]:
        """Documents, as many at once as hold the tokens of a batch."""
        from pipelines.stages.evaluate.measures.in_context_work import ScoreBeginnings, long_documents

        if setting.has_loss_mask or not setting.reads_ids:
            return []
        length = config.length(setting.training_seq_len)
        at_once = max(1, setting.config.rows(setting.seq_len) * setting.seq_len // length)
        tasks = []
        for source, starts in enumerate(long_documents(config, setting)):
            for first in range(0, len(starts), at_once):
                work = ScoreBeginnings(source, tuple(starts[first : first + at_once]), length)
                tasks.append(Task(f"{source}-{first:06d}", work, setting.config.resources))
        return tasks

    def reduce(self, config: InContextConfig, setting: Setting, results: Mapping[str, TaskResult]) -> Measured:
        """The curve, and the score."""
        from pipelines.stages.evaluate.measures.in_context_work import measured

        return measured(config, setting, results)
