"""Base of all mixers: a causal map of a sequence, over a whole sequence at once or one piece after another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bmojo.fields import ModelFields
from bmojo.layers import RotaryTable, first
from bmojo.state import LayerState

StateT = TypeVar("StateT", bound=LayerState)


@dataclass(frozen=True)
class Sequence:
    """What mixers need to know about the tokens they are given, beside their features."""

    num_tokens: int
    start: int  # position of the first token
    doc_ids_bt: Tensor | None
    rotary: RotaryTable  # at positions start .. start + num_tokens - 1
    return_memory: bool = False
    wanted_bt: Tensor | None = None  # bool: positions that the rule `oracle` keeps
    delta_error: bool = False  # whether a recurrent mixer also gives MixerOutput.delta_error_bt

    def first(self, num_tokens: int) -> Sequence:
        """Its first tokens."""
        if num_tokens == self.num_tokens:
            return self
        doc_ids_bt, wanted_bt = (None if x is None else first(x, num_tokens) for x in (self.doc_ids_bt, self.wanted_bt))
        rotary = self.rotary.first(num_tokens)
        return replace(self, num_tokens=num_tokens, doc_ids_bt=doc_ids_bt, rotary=rotary, wanted_bt=wanted_bt)


class LayerMemory(NamedTuple):
    """What a B'MOJO layer remembered, for inspection. Attention mass is averaged over heads and sums to 1."""

    innovation_bt: Tensor | None  # e_i of every position; None if the layer has no eidetic set
    kept_position_bjm: Tensor | None  # eidetic set of every chunk, best first; -1: empty slot
    mass_bt3: Tensor  # share of attention on window, fading and eidetic memory


class MixerOutput(NamedTuple):
    out_btd: Tensor
    predictor_loss: Tensor | None = None  # of a learned innovation predictor, mean over positions
    memory: LayerMemory | None = None
    delta_error_bt: Tensor | None = None  # see ssm.delta_error


class LengthRule(NamedTuple):
    """The length of training sequences must be a multiple of a field of the config."""

    field: str
    multiple_of: int


@dataclass(frozen=True)
class MixerCounts:
    """Counts of one layer's mixer, for a batch of one. Parts of the same name are added over the layers."""

    params: dict[str, int]  # by part
    flops: dict[str, float]  # by part; forward, per token; one multiply-add is two
    state_bytes: int  # of decoding, float32


class Mixer(nn.Module, Generic[StateT]):
    """A layer's token mixer, and all that is known about it."""

    IS_EIDETIC: ClassVar[bool] = False
    """Whether there is an eidetic memory, of num_eidetic slots."""
    FLOAT32: ClassVar[tuple[str, ...]] = ()
    """Own parameters that stay in float32 and out of weight decay, whatever the precision."""

    NOT_FLOAT8: ClassVar[tuple[str, ...]] = ()
    """Own projections that `precision: float8` leaves in bfloat16."""

    def __init__(self, config: ModelFields) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def check(cls, config: ModelFields) -> None:
        """Raise ValueError if a layer cannot be built from these fields."""
        raise NotImplementedError

    @classmethod
    def counts(cls, config: ModelFields, seq_len: int) -> MixerCounts:
        """Counts of a layer trained at, or read up to, `seq_len` tokens."""
        raise NotImplementedError

    @classmethod
    def length_rule(cls, config: ModelFields) -> LengthRule | None:
        """What the length of training sequences must be a multiple of; None: any length will do."""
        return None

    def init_weights(self, generator: torch.Generator) -> None:
        """Set the parameters that belong to no Linear and no RMSNorm."""

    def forward(self, u_btd: Tensor, sequence: Sequence, state: StateT | None = None) -> MixerOutput:
        """Mix a piece of a sequence. With a state: continue from it and leave it as after the piece, in place."""
        raise NotImplementedError

    def make_tables(self, rotary: RotaryTable) -> None:
        """Make the rotary tables that `forward` reads, before a compiler looks at it."""
        rotary.make()

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable, state: StateT) -> Tensor:
        """Mix one token per row, each row at a position of its own, and update the state in place."""
        raise NotImplementedError

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> StateT:
        """The state before the first token."""
        raise NotImplementedError
