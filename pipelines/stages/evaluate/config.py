"""Settings of the `evaluate` stage, and what follows from them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from base.config import NOT_IN_FINGERPRINT
from pipelines.engine.stage import StageConfig
from pipelines.stages.evaluate.external import ExternalModelConfig
from pipelines.stages.evaluate.gate import GateConfig
from pipelines.stages.evaluate.measures import DEFAULT, AnyMeasureConfig
from pipelines.stages.precision import Precision, used_precision

CPU_BATCH_SIZE = 8
GPU_BATCH_TOKENS = 65_536


class EvaluateStageConfig(StageConfig):
    """Measure a trained model, on the validation split of `tokenize` stages and otherwise."""

    kind: Literal["evaluate"]
    measures: tuple[AnyMeasureConfig, ...] = Field(
        DEFAULT,
        min_length=1,
        description="What is measured. A measure that does not apply to the tokens finds nothing.",
    )
    model: ExternalModelConfig | None = Field(
        None,
        description="A model from elsewhere, instead of that of a train stage: an exported folder, or one of the "
        "Hugging Face hub. It reads the text of the tokenize stages with its own tokenizer.",
    )
    step: int | None = Field(
        None,
        ge=1,
        description="Evaluate the checkpoint of this step of the training, which must be kept (the train stage's "
        "keep_checkpoints); null: the final model.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description=f"Sequences scored at once; null: {CPU_BATCH_SIZE} on the CPU, on a GPU as many as hold about "
        f"{GPU_BATCH_TOKENS:,} tokens.",
    )
    precision: Precision = Field(
        "auto",
        description="bf16: matrix products in bfloat16 under autocast. auto: bf16 on a GPU, fp32 on the CPU.",
        json_schema_extra=NOT_IN_FINGERPRINT,  # as such: settled() puts in what is used
    )

    gate: GateConfig | None = Field(
        None,
        description="Bounds for figures, beyond which nothing goes on from this evaluation; null: none.",
        json_schema_extra=NOT_IN_FINGERPRINT,  # the result is the same, and is judged each time that a run takes it
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [measure.called for measure in self.measures]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two measures are called {name!r}; give each a `name` of its own.")
        return self

    def settled(self) -> dict[str, Any]:
        """What changes numbers and depends on the resources: the precision, and how the work is cut."""
        batch = f"{GPU_BATCH_TOKENS} tokens" if self.on_gpu else CPU_BATCH_SIZE
        return {"batch_size": self.batch_size or batch, "precision": self.used_precision}

    @property
    def on_gpu(self) -> bool:
        """The model computes on GPUs."""
        return self.resources.gpus_per_worker > 0

    @property
    def used_precision(self) -> Literal["fp32", "bf16"]:
        """What `precision` amounts to on these resources."""
        return used_precision(self.precision, self.on_gpu)

    def rows(self, seq_len: int) -> int:
        """Sequences of the validation split that go through the model at once; a GPU is filled by tokens."""
        return self.batch_size or (max(1, GPU_BATCH_TOKENS // seq_len) if self.on_gpu else CPU_BATCH_SIZE)

    def long_rows(self, num_tokens: int) -> int:
        """Stretches of so many tokens that go through the model at once: one on the CPU."""
        return max(1, GPU_BATCH_TOKENS // num_tokens) if self.on_gpu else 1
