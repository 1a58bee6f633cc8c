"""The number format that a stage computes in: one vocabulary and one rule for all stages with a model."""

from __future__ import annotations

from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]
"""bf16: matrix products in bfloat16 under autocast, parameters in float32. auto: bf16 on a GPU, fp32 on the CPU."""


def used_precision(precision: Precision, on_gpu: bool) -> Literal["fp32", "bf16"]:
    """What a setting amounts to on the workers' devices."""
    if precision == "auto":
        return "bf16" if on_gpu else "fp32"
    return precision
