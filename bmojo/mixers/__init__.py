"""Token mixers, by the names a layer pattern uses."""

from __future__ import annotations

from bmojo.config import ModelConfig
from bmojo.mixers.attention import Attention
from bmojo.mixers.base import LayerMemory, Mixer, MixerOutput, Sequence
from bmojo.mixers.bmojo import BMojo
from bmojo.mixers.mamba import Mamba
from bmojo.mixers.mamba2 import Mamba2
from bmojo.pattern import MixerName

__all__ = ["LayerMemory", "Mixer", "MixerOutput", "Sequence", "build_mixer"]


def build_mixer(name: MixerName, config: ModelConfig) -> Mixer:
    """The mixer of one layer."""
    match name:
        case "attention":
            return Attention(config, window_size=None)
        case "swa":
            return Attention(config, window_size=config.window_size)
        case "mamba":
            return Mamba(config)
        case "mamba2":
            return Mamba2(config, config.ssm_expand)
        case "bmojo_f":
            return BMojo(config, num_eidetic=0)
        case "bmojo":
            return BMojo(config, config.num_eidetic)
