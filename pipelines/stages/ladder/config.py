"""Settings of the `ladder` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from base.config import StrictConfig
from bmojo import ModelConfig
from pipelines.engine.stage import StageConfig


class Target(StrictConfig):
    """A size whose loss is predicted: FLOPs, or a model and its tokens."""

    flops: PositiveFloat | None = Field(None, description="Of the whole training, forward and backward.")
    model: ModelConfig | None = Field(
        None, description="The model; its vocab_size is that of the ladder where left out."
    )
    max_tokens: PositiveInt | None = Field(None, description="Tokens that the model would be trained on.")

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Target:
        with_model = self.model is not None and self.max_tokens is not None
        if (self.flops is None) != with_model or (self.model is None) != (self.max_tokens is None):
            raise ValueError("expected either flops, or model and max_tokens: they say how much compute it has.")
        return self


class LadderStageConfig(StageConfig):
    """Fit the loss of the train stages that it needs against their compute, and predict larger ones."""

    kind: Literal["ladder"]
    predict: tuple[Target, ...] = Field((), description="Sizes whose loss is predicted.")
