"""What every mixer is: a causal map of a sequence, over a whole sequence at once or one piece after another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bmojo.config import ModelConfig
from bmojo.layers import RotaryTable
from bmojo.state import LayerState


@dataclass(frozen=True)
class Sequence:
    """What mixers need to know about the tokens they are given, beside their features."""

    num_tokens: int
    start: int  # position of the first token
    doc_ids_bt: Tensor | None
    rotary: RotaryTable | None  # at positions start .. start + num_tokens - 1; None without attention layers
    return_memory: bool = False

    def first(self, num_tokens: int) -> Sequence:
        """Its first tokens."""
        if num_tokens == self.num_tokens:
            return self
        doc_ids_bt = None if self.doc_ids_bt is None else self.doc_ids_bt[:, :num_tokens]
        rotary = None if self.rotary is None else self.rotary.first(num_tokens)
        return replace(self, num_tokens=num_tokens, doc_ids_bt=doc_ids_bt, rotary=rotary)


class LayerMemory(NamedTuple):
    """What a B'MOJO layer remembered, for inspection. Attention mass is averaged over heads and sums to 1."""

    innovation_bt: Tensor | None  # e_i of every position; None where the layer has no eidetic set
    kept_position_bjm: Tensor | None  # eidetic set of every chunk, best first; -1: empty slot
    mass_bt3: Tensor  # share of attention on window, fading and eidetic memory


class MixerOutput(NamedTuple):
    out_btd: Tensor
    predictor_loss: Tensor | None = None  # of a learned innovation predictor, mean over positions
    memory: LayerMemory | None = None


class Mixer(nn.Module):
    """A layer's token mixer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, u_btd: Tensor, sequence: Sequence, state: LayerState | None = None) -> MixerOutput:
        """Mix a piece of a sequence. With a state: continue from it and leave it as after the piece, in place."""
        raise NotImplementedError

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable | None, state: LayerState) -> Tensor:
        """Mix one token a row, each row at a position of its own, and update the state in place."""
        raise NotImplementedError

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """The state before the first token."""
        raise NotImplementedError
