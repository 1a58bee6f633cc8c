"""Settings of the `evaluate` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from base.config import StrictConfig
from pipelines.engine.stage import StageConfig


class SampleConfig(StrictConfig):
    """Text to generate from the trained model."""

    prompts: tuple[str, ...] = Field(("",), description="Beginnings the model continues; empty starts a new document.")
    max_new_tokens: int = Field(200, ge=1, description="Tokens to generate for each prompt.")
    temperature: float = Field(0.8, ge=0, description="Softmax temperature; 0 always takes the likeliest token.")
    top_k: int | None = Field(50, ge=1, description="Sample from the k likeliest tokens only; null: from all.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the likeliest tokens with this total probability."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampling.")


class EvaluateStageConfig(StageConfig):
    """Measure a trained model on the validation split of a `tokenize` stage."""

    kind: Literal["evaluate"]
    max_tokens: int | None = Field(
        None, ge=1, description="Score at most about this many validation tokens (whole sequences); null: all of them."
    )
    batch_size: int = Field(8, ge=1, description="Sequences scored at once.")
    context_multiple: int = Field(
        4, ge=1, description="Perplexity by position goes up to this many times the training length."
    )
    context_windows: int = Field(
        16, ge=1, description="Stretches of long documents, at most, that perplexity by position averages over."
    )
    baselines: bool = Field(True, description="Also score gzip -9 and the untrained model on the same documents.")
    sample: SampleConfig = Field(default_factory=SampleConfig, description="The sample of generated text.")
