"""Fields that define a model of the family, and what follows from them. Letters in brackets are the paper's symbols.

No mixer is known here: bmojo.config checks the fields by the rules of the pattern's mixers.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from base.config import ADDED_LATER, StrictConfig
from bmojo.pattern import expand_pattern

ActivationCheckpointing = Literal["none", "pointwise", "attention", "block"]
"""What the backward pass computes again instead of keeping it: next to nothing; on a GPU also norms, rotations,
convolutions and casts of weights; each layer's mixer; or each whole block."""
Selection = Literal["innovation", "delta_error", "threshold", "recency", "value_norm", "random", "oracle"]
"""Names of bmojo.mixers.selection.RULES."""


class ModelFields(StrictConfig):
    """Fields of bmojo.config.ModelConfig; what mixers and layers are built from."""

    # The stack
    pattern: str = "bmojo*12"
    vocab_size: int | None = Field(
        default=None, gt=0, description="Number of token ids; null is filled in from the tokenizer by the pipeline."
    )
    d_model: int = Field(default=768, gt=0, le=2**20, description="Width of the residual stream, in channels [d].")
    d_ff: int | None = Field(
        default=None,
        ge=0,
        description="Hidden width of SwiGLU; null: 8/3 d_model, to a multiple of 64; 0: none.",
    )
    tie_embeddings: bool = Field(default=True, description="Share the embedding matrix with the output projection.")
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the mean square in every RMSNorm.")
    residual_precision: Literal["float32", "compute"] = Field(
        default="float32",
        description="Precision of the residual stream in training with bf16: float32, or that of the products.",
    )

    # Attention, in the mixers attention, swa, bmojo_f and bmojo
    num_heads: int = Field(default=12, gt=0, description="Attention query heads per layer [h].")
    num_kv_heads: int | None = Field(default=None, gt=0, description="Key/value heads (GQA); null: num_heads.")
    head_dim: int | None = Field(
        default=None, gt=0, description="Channels of an attention head [p]; null: d_model / num_heads."
    )
    window_size: int = Field(
        default=512, gt=0, description="Tokens in the sliding window, the current one included [W]."
    )
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary position embedding.")
    qk_norm: bool = Field(default=False, description="RMSNorm on queries and keys, per head, before RoPE.")
    attention_conv_width: Literal[0, 2, 3, 4] = Field(
        default=0,
        description="Taps of a causal convolution whose SiLU is added to queries, keys and values; 0: none.",
        json_schema_extra=ADDED_LATER,
    )

    # Recurrent mixers; bmojo_f and bmojo contain one
    d_state: int = Field(default=64, gt=0, description="State size per head and channel [n]; mamba has its own.")
    ssm_head_dim: int = Field(default=64, gt=0, description="Channels of a recurrent head [p].")
    ssm_num_groups: int = Field(default=1, gt=0, description="Groups of heads that share B and C in Mamba-2.")
    ssm_expand: int = Field(default=2, gt=0, description="Inner width of recurrent layers, in units of d_model.")
    conv_width: int = Field(default=4, ge=2, le=4, description="Taps of the causal convolution before the SSM.")
    dt_min: float = Field(default=1e-3, gt=0, description="Lowest step size dt at initialisation.")
    dt_max: float = Field(default=1e-1, gt=0, description="Highest step size dt at initialisation.")
    a_min: float = Field(default=1.0, gt=0, description="Lowest decay rate -A at initialisation, except in mamba.")
    a_max: float = Field(default=16.0, gt=0, description="Highest decay rate -A at initialisation, except in mamba.")
    mamba_d_state: int = Field(default=16, gt=0, description="State size of Mamba-1, per channel.")
    mamba_dt_rank: int | None = Field(
        default=None, gt=0, description="Rank of Mamba-1's step-size projection; null: d_model / 16, rounded up."
    )

    # B'MOJO memories, in the mixers bmojo_f and bmojo
    fading_ssm: Literal["mamba2", "gated_deltanet"] = Field(
        default="mamba2", description="The recurrent layer whose output y is the fading memory."
    )
    fading_expand: int = Field(default=1, gt=0, description="Inner width of that layer, in units of d_model.")
    fading_projections: Literal["tied", "separate"] = Field(
        default="tied", description="Whether fading keys and values use the window's projections or their own."
    )
    fading_output: Literal["memory", "memory_and_residual"] = Field(
        default="memory",
        description="Where the SSM's output y goes. memory: attention reads it beyond the window. memory_and_residual: "
        "also gain * y is added to the layer's output, with one learned gain per channel.",
    )
    fading_gain: float = Field(
        default=0.35,
        ge=0,
        description="That gain at initialisation; y has the scale of the layer's input.",
        json_schema_extra=ADDED_LATER,
    )
    chunk_size: int = Field(
        default=128, gt=0, description="Tokens between updates of the eidetic set [C]; at most window_size."
    )
    num_eidetic: NonNegativeInt | tuple[NonNegativeInt, ...] = Field(
        default=64,
        description="Eidetic slots: tokens kept verbatim beyond the window [M]. A list has a number for each bmojo "
        "layer, first to last. May be raised later.",
    )
    selection: Selection = Field(
        default="innovation",
        description="Rule that ranks tokens for the eidetic set; all but innovation are controls and other papers'.",
    )
    selection_threshold: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Innovation score above which selection=threshold keeps a token; 1: predicted no better than by 0.",
        json_schema_extra=ADDED_LATER,
    )
    innovation_predictor: Literal["fixed", "learned"] = Field(
        default="fixed", description="Weights of the predictor: an exponential average, or learned per channel."
    )
    innovation_taps: int = Field(default=4, gt=0, description="Past outputs the predictor reads [K].")
    innovation_decay: float = Field(
        default=0.5, gt=0, le=1, description="Ratio of successive weights of the fixed (or initial) predictor."
    )
    innovation_tau: float | None = Field(
        default=None, gt=0, description="Forgetting time of stored innovations, in tokens [tau]; null: none."
    )
    innovation_loss_weight: float = Field(default=0.1, ge=0, description="Weight of a learned predictor's own loss.")

    # Loss and initialisation
    z_loss_weight: float = Field(default=0.0, ge=0, description="Weight of the mean squared log-partition (z-loss).")
    init_std: float = Field(default=0.02, gt=0, description="Standard deviation of weight matrices at initialisation.")

    @cached_property
    def mixers(self) -> tuple[str, ...]:
        """Name of each layer's mixer."""
        return expand_pattern(self.pattern)

    @property
    def num_layers(self) -> int:
        return len(self.mixers)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def ff_width(self) -> int:
        """Hidden width of SwiGLU; 0 if blocks have none."""
        return 64 * -(-8 * self.d_model // (3 * 64)) if self.d_ff is None else self.d_ff

    @property
    def dt_rank(self) -> int:
        return self.mamba_dt_rank or -(-self.d_model // 16)

    @property
    def adds_fading_output(self) -> bool:
        """bmojo and bmojo_f add gain * y to their output."""
        return self.fading_output == "memory_and_residual"

    @property
    def residual_std(self) -> float:
        """Standard deviation, at initialisation, of matrices whose product is added to the residual stream (GPT-2)."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> ModelFields:
        if self.dt_min >= self.dt_max or self.a_min > self.a_max:
            raise ValueError("dt_min must be below dt_max, and a_min not above a_max.")
        return self
