"""The recurrent layers whose output y is the fading memory of B'MOJO. y starts with about the scale of u."""

from __future__ import annotations

import math

from bmojo.fields import ModelFields
from bmojo.mixers.gated_deltanet import GatedDeltaNet
from bmojo.mixers.mamba2 import Mamba2


class FadingMamba2(Mamba2):
    """Mamba-2. Its norm comes last, so that y has the scale of u whatever the gate is."""

    @staticmethod
    def expand(config: ModelFields) -> tuple[str, int]:
        return "fading_expand", config.fading_expand

    @classmethod
    def out_std(cls, config: ModelFields) -> float:
        return float(cls.widths(config).inner ** -0.5)


class FadingGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet. Its gate comes after the norm, and makes y smaller, which the out-projection undoes."""

    @staticmethod
    def expand(config: ModelFields) -> tuple[str, int]:
        return "fading_expand", config.fading_expand

    @classmethod
    def out_std(cls, config: ModelFields) -> float:
        gate = silu_rms(config.init_std * math.sqrt(config.d_model))
        return float(cls.widths(config).inner ** -0.5) / gate


FadingMemory = FadingMamba2 | FadingGatedDeltaNet
FADING: dict[str, type[FadingMamba2] | type[FadingGatedDeltaNet]] = {
    "mamba2": FadingMamba2,
    "gated_deltanet": FadingGatedDeltaNet,
}
"""By the field `fading_ssm`."""


def silu_rms(std: float) -> float:
    """Root of the mean square of SiLU(z) for normal z: a sum over 6 standard deviations."""
    steps = [i / 50 for i in range(-300, 301)]
    weights = [math.exp(-x * x / 2) for x in steps]
    squares = [(std * x / (1 + math.exp(-std * x))) ** 2 for x in steps]
    return math.sqrt(sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights))
