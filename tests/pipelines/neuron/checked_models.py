"""The models whose graphs are checked: of every mixer in the table, and B'MOJO with its options."""

from __future__ import annotations

from typing import Any

from bmojo import ModelConfig
from bmojo.mixers import MIXERS
from tests.bmojo.model_family import small_config

SEQ_LEN = 512
OPTIONS: dict[str, dict[str, Any]] = {
    "bmojo of Gated DeltaNet": {
        "pattern": "bmojo", "fading_ssm": "gated_deltanet", "fading_projections": "separate",
        "fading_output": "memory_and_residual", "attention_conv_width": 3, "qk_norm": True, "num_kv_heads": 2,
    },
    "bmojo with a predictor": {
        "pattern": "bmojo", "innovation_predictor": "learned", "innovation_tau": 100.0, "tie_embeddings": False,
        "z_loss_weight": 1e-4, "ssm_num_groups": 2,
    },
    "bmojo that reads corrections": {"pattern": "bmojo", "selection": "delta_error", "innovation_tau": 100.0},
}  # fmt: skip
CHECKED = {mixer: {"pattern": mixer} for mixer in MIXERS} | OPTIONS


def checked_config(**fields: Any) -> ModelConfig:
    """Narrow, and long enough that tokens leave the window."""
    return small_config(**{"window_size": 128, "chunk_size": 64} | fields)
