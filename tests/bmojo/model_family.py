"""Small random models of every kind, for the property tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bmojo import BMojoLM, ModelConfig
from bmojo.mixers import MIXERS
from bmojo.mixers.selection import RULES

VOCAB_SIZE = 23
MIXED = "mamba2,bmojo,swa"
PATTERNS = (*(f"{name}*2" for name in MIXERS), MIXED)


def small_config(**fields: Any) -> ModelConfig:
    defaults: dict[str, Any] = {
        "pattern": "bmojo*2", "vocab_size": VOCAB_SIZE, "d_model": 16, "num_heads": 4, "d_ff": 16, "ssm_head_dim": 8,
        "d_state": 4, "mamba_d_state": 3, "window_size": 6, "chunk_size": 4, "num_eidetic": 5,
    }  # fmt: skip
    return ModelConfig(**(defaults | fields))


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> BMojoLM:
    """A model whose weights are large enough that every part shows in the logits, no two of them alike."""
    model = BMojoLM(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "conv" not in name and "A_log" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith(("fading_gain", "q_conv.weight", "kv_conv.weight")):
                parameter.normal_(generator=generator)
    return model.to(dtype)


def random_tokens(batch: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch, t), generator=torch.Generator().manual_seed(seed))


@st.composite
def configs(draw: st.DrawFn, patterns: tuple[str, ...] = PATTERNS) -> ModelConfig:
    window_size = draw(st.integers(1, 9))
    num_kv_heads = draw(st.sampled_from([1, 2, 4]))
    rules = sorted(set(RULES) - {"oracle"})  # for which nothing is marked here
    selection = draw(st.sampled_from(["innovation", *rules]))
    return small_config(
        pattern=draw(st.sampled_from(patterns)),
        window_size=window_size,
        chunk_size=draw(st.integers(1, window_size)),
        num_eidetic=draw(st.sampled_from([1, 3, 40])),
        num_kv_heads=num_kv_heads,
        ssm_num_groups=draw(st.sampled_from([1, 2])),
        conv_width=draw(st.integers(2, 4)),
        qk_norm=draw(st.booleans()),
        attention_conv_width=draw(st.sampled_from([0, 0, 2, 4])),
        fading_ssm=draw(st.sampled_from(["mamba2", "gated_deltanet"])),
        fading_projections=draw(st.sampled_from(["tied", "separate"])),
        fading_output=draw(st.sampled_from(["memory", "memory_and_residual"])),
        innovation_predictor=draw(st.sampled_from(["fixed", "learned"])),
        innovation_taps=draw(st.integers(1, 4)),
        innovation_tau=draw(st.sampled_from([None, 7.0])) if RULES[selection].AGES else None,
        selection=selection,
        selection_threshold=1.2 if selection == "threshold" else None,
    )
