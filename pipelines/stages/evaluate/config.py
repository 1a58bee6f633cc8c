"""Settings of the `evaluate` stage, and what follows from them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field

from base.config import StrictConfig
from pipelines.engine.stage import NOT_IN_FINGERPRINT, StageConfig
from pipelines.stages.precision import Precision, used_precision

CPU_BATCH_SIZE = 8
GPU_BATCH_TOKENS = 65_536
BATCHES_PER_TASK = 4


class SampleConfig(StrictConfig):
    """Text to generate from the trained model."""

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


class Pieces(NamedTuple):
    """How the work is cut: what goes through the model at once, and how many of those batches are a task.

    Attributes:
        batch_size: sequences of the validation split.
        windows: stretches of long documents.
        prompts: texts to continue.
    """

    batch_size: int
    batches_per_task: int
    windows: int
    prompts: int


class EvaluateStageConfig(StageConfig):
    """Measure a trained model on the validation split of a `tokenize` stage."""

    kind: Literal["evaluate"]
    max_tokens: int | None = Field(
        None, ge=1, description="Score at most about this many validation tokens (whole sequences); null: all of them."
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
    context_multiple: int = Field(
        4, ge=1, description="Perplexity by position goes up to this many times the training length."
    )
    context_windows: int = Field(
        16, ge=1, description="Stretches of long documents, at most, that perplexity by position averages over."
    )
    baselines: bool = Field(True, description="Also score gzip -9 and the untrained model on the same documents.")
    sample: SampleConfig = Field(default_factory=SampleConfig, description="The sample of generated text.")

    def settled(self) -> dict[str, Any]:
        """What changes numbers and depends on the resources: the precision, and how the work is cut.

        In float32 on the CPU as before there was a precision, so that what was evaluated then is reused.
        """
        if self.on_gpu:
            batch = self.batch_size or f"{GPU_BATCH_TOKENS} tokens"
            return {"batch_size": batch, "precision": self.used_precision}
        precision = {} if self.used_precision == "fp32" else {"precision": self.used_precision}
        return {"batch_size": self.batch_size or CPU_BATCH_SIZE, **precision}

    @property
    def on_gpu(self) -> bool:
        """The model computes on GPUs."""
        return self.resources.gpus_per_worker > 0

    @property
    def used_precision(self) -> Literal["fp32", "bf16"]:
        """What `precision` amounts to on these resources."""
        return used_precision(self.precision, self.on_gpu)

    def pieces(self, seq_len: int, window_tokens: int) -> Pieces:
        """How the work is cut. On a GPU by tokens, so that it is full; the same for any number of workers.

        Args: window_tokens: of each stretch of a long document.
        """
        if not self.on_gpu:
            return Pieces(self.batch_size or CPU_BATCH_SIZE, BATCHES_PER_TASK, windows=1, prompts=1)
        return Pieces(
            self.batch_size or max(1, GPU_BATCH_TOKENS // seq_len),
            BATCHES_PER_TASK,
            windows=max(1, GPU_BATCH_TOKENS // window_tokens),
            prompts=max(1, len(self.sample.prompts)),
        )
