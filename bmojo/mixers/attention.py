"""Softmax attention with RoPE: over everything before (`attention`) or over a sliding window (`swa`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bmojo.fields import ModelFields
from bmojo.layers import KeysValues, Linear, RMSNorm, RotaryTable, halves, project_each
from bmojo.mixers import ring
from bmojo.mixers.base import Mixer, MixerCounts, MixerOutput, Sequence
from bmojo.mixers.short_conv import ConvTails, ShortConv
from bmojo.state import LayerState
from kernels.memory_attention import memory_attention, memory_attention_step
from kernels.memory_write import Rings, memory_write


class Projections(nn.Module):
    """Queries from u, keys and values from whatever stands in memory.

    Optional: a short convolution of the projections of u, and RMSNorm on queries and keys. The convolution leaves keys
    and values of y alone, see docs/design/0060.
    """

    def __init__(self, config: ModelFields) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.attention_head_dim
        self.q_proj = Linear(config.d_model, self.query_width(config), config.init_std)
        self.kv_proj = Linear(config.d_model, self.kv_width(config), config.init_std)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.q_conv: ShortConv | None = None
        self.kv_conv: ShortConv | None = None
        if config.attention_conv_width:
            self.q_conv = ShortConv(self.query_width(config), config.attention_conv_width)
            self.kv_conv = ShortConv(self.kv_width(config), config.attention_conv_width)

    @staticmethod
    def check(config: ModelFields) -> None:
        """See Mixer.check."""
        if config.head_dim is None and config.d_model % config.num_heads:
            raise ValueError(
                f"d_model={config.d_model} is not a multiple of num_heads={config.num_heads}; change one, "
                "or set head_dim."
            )
        if config.num_heads % config.kv_heads:
            raise ValueError(f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}.")
        if config.attention_head_dim % 2:
            raise ValueError(f"head_dim={config.attention_head_dim} is odd; RoPE rotates channels in pairs.")

    @staticmethod
    def query_width(config: ModelFields) -> int:
        """Channels of all query heads."""
        return config.num_heads * config.attention_head_dim

    @staticmethod
    def kv_width(config: ModelFields) -> int:
        """Channels of all key and value heads together."""
        return 2 * config.kv_heads * config.attention_head_dim

    @classmethod
    def num_params(cls, config: ModelFields) -> int:
        norms = 2 * config.attention_head_dim if config.qk_norm else 0
        channels = cls.query_width(config) + cls.kv_width(config)
        return channels * (config.d_model + config.attention_conv_width) + norms

    @classmethod
    def tail_bytes(cls, config: ModelFields) -> int:
        """What decoding keeps for the convolution, in float32."""
        past = max(config.attention_conv_width - 1, 0)
        return 4 * past * (cls.query_width(config) + cls.kv_width(config))

    def init_weights(self) -> None:
        """Of the convolution."""
        for conv in (self.q_conv, self.kv_conv):
            if conv is not None:
                conv.init_weights()

    def init_tails(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ConvTails | None:
        """What the convolution's other taps see before the first token."""
        if self.q_conv is None or self.kv_conv is None:
            return None
        return ConvTails(*(conv.empty_tail(batch_size, device, dtype) for conv in (self.q_conv, self.kv_conv)))

    def queries(self, u_btd: Tensor, sequence: Sequence, tails: ConvTails | None = None) -> Tensor:
        """Not rotated, [b, t, h, p]."""
        projected = self.q_proj(u_btd)
        if self.q_conv is not None:
            projected = self.q_conv(projected, None if tails is None else tails.q, sequence.doc_ids_bt)
        return self.as_queries(projected)

    def as_queries(self, projected: Tensor) -> Tensor:
        """What q_proj gives, by head."""
        q = projected.unflatten(-1, (self.num_heads, self.head_dim))
        return q if self.q_norm is None else self.q_norm(q)

    def keys_values(
        self, u_btd: Tensor, sequence: Sequence, tails: ConvTails | None = None
    ) -> tuple[KeysValues, Tensor]:
        """Keys rotated to their positions and values; keys not rotated."""
        projected = self.kv_proj(u_btd)
        if self.kv_conv is not None:
            projected = self.kv_conv(projected, None if tails is None else tails.kv, sequence.doc_ids_bt)
        return self._rotated(projected, sequence.rotary)

    def fading_keys_values(self, y_btd: Tensor, sequence: Sequence, proj: Linear | None) -> KeysValues:
        """Those of y, keys rotated. proj: their own projection, if there is one."""
        return self._rotated((proj or self.kv_proj)(y_btd), sequence.rotary)[0]

    def with_neighbours(self, queries: Tensor, keys_values: Tensor, tails: ConvTails | None) -> tuple[Tensor, Tensor]:
        """What q_proj and kv_proj give for one token per row, after the convolution, if there is one."""
        if tails is None or self.q_conv is None or self.kv_conv is None:
            return queries, keys_values
        return self.q_conv.step(queries, tails.q), self.kv_conv.step(keys_values, tails.kv)

    def _rotated(self, projected: Tensor, rotary: RotaryTable) -> tuple[KeysValues, Tensor]:
        if self.k_norm is None:
            return rotary.rotated_keys(self._by_head(projected))
        k, v = (half.unflatten(-1, (self.kv_heads, self.head_dim)) for half in halves(projected))
        k = self.k_norm(k)
        return KeysValues(rotary.rotate(k), v), k

    def as_keys_values(self, projected: Tensor) -> KeysValues:
        """What kv_proj gives, by head; keys not rotated."""
        k, v = self._by_head(projected).chunk(2, -2)
        return KeysValues(k if self.k_norm is None else self.k_norm(k), v)

    def _by_head(self, keys_values: Tensor) -> Tensor:
        return keys_values.unflatten(-1, (2 * self.kv_heads, self.head_dim))


@dataclass
class RingCache(LayerState):
    """Keys (rotated) and values of the last r positions, in rings; and what a short convolution of them sees."""

    k: Tensor
    v: Tensor
    conv: ConvTails | None = None

    @classmethod
    def empty(
        cls, projections: Projections, batch_size: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> RingCache:
        heads = (projections.kv_heads, projections.head_dim)
        k, v = (ring.zeros(batch_size, size, *heads, dtype, device) for _ in range(2))
        return cls(k, v)

    def before(self, position: int) -> KeysValues:
        """What is held of the positions before, in order."""
        return KeysValues(ring.in_order(self.k, position), ring.in_order(self.v, position))

    def refill(self, window: KeysValues, end: int) -> None:
        """Hold the last of rows that end just before position `end`."""
        ring.refill(self.k, window.k, end)
        ring.refill(self.v, window.v, end)

    def make_room(self, position_b: Tensor) -> None:
        """Before a row of each of these positions is written."""


@dataclass
class GrowingCache(RingCache):
    """Keys (rotated) and values of all positions: slots are positions."""

    def before(self, position: int) -> KeysValues:
        return KeysValues(self.k[:, :position], self.v[:, :position])

    def refill(self, window: KeysValues, end: int) -> None:
        self.k, self.v = window.k.to(self.k.dtype), window.v.to(self.v.dtype).contiguous()  # v was beside k

    def make_room(self, position_b: Tensor) -> None:
        """Double the room if it is full; on a GPU the host waits to know."""
        num_tokens, capacity = int(position_b.max()) + 1, self.k.shape[1]
        if num_tokens > capacity:
            self._grow(max(64, 2 * capacity, num_tokens))

    @property
    def room(self) -> int | None:
        return 0

    def reserve(self, num_tokens: int) -> ReservedCache:
        self._grow(num_tokens)
        return ReservedCache(self.k, self.v, self.conv)

    def _grow(self, capacity: int) -> None:
        if capacity > self.k.shape[1]:
            self.k, self.v = ring.resized(self.k, capacity), ring.resized(self.v, capacity)


@dataclass
class ReservedCache(GrowingCache):
    """One whose room holds all positions that will come: who reserved it counts them, and the host need not wait."""

    @property
    def room(self) -> int | None:
        return self.k.shape[1]

    def refill(self, window: KeysValues, end: int) -> None:
        self._check(end)
        self.k[:, :end], self.v[:, :end] = window

    def make_room(self, position_b: Tensor) -> None:
        if position_b.is_cpu:
            self._check(int(position_b.max()) + 1)

    def _check(self, num_tokens: int) -> None:
        if num_tokens > self.k.shape[1]:
            raise ValueError(
                f"the decoding state has room for {self.k.shape[1]} tokens, and these are {num_tokens}: "
                "reserve more with state.reserve(num_tokens)."
            )


class Attention(Mixer[RingCache]):
    """Full causal attention, whose decoding state grows with every token."""

    CACHE: ClassVar[type[RingCache]] = GrowingCache

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.projections = Projections(config)
        self.out_proj = Linear(Projections.query_width(config), config.d_model, config.residual_std)

    @staticmethod
    def window_size(config: ModelFields, num_tokens: int) -> int:
        """Number of last tokens, of `num_tokens`, that a query reads."""
        return num_tokens

    @classmethod
    def check(cls, config: ModelFields) -> None:
        Projections.check(config)

    @classmethod
    def counts(cls, config: ModelFields, seq_len: int) -> MixerCounts:
        queries, keys_values = Projections.query_width(config), Projections.kv_width(config)
        window_size = cls.window_size(config, seq_len)
        projections = config.d_model * (2 * queries + keys_values)
        flops = {
            "attention_projections": 2.0 * projections,
            "attention": 4.0 * queries * mean_keys(seq_len, window_size),
        }
        num_params = Projections.num_params(config) + queries * config.d_model
        state_bytes = 4 * window_size * keys_values + Projections.tail_bytes(config)
        return MixerCounts({"attention": num_params}, flops, state_bytes)

    def init_weights(self, generator: torch.Generator) -> None:
        """See the table in bmojo.model."""
        self.projections.init_weights()

    def forward(self, u_btd: Tensor, sequence: Sequence, state: RingCache | None = None) -> MixerOutput:
        tails = None if state is None else state.conv
        q_bthp = sequence.rotary.rotate(self.projections.queries(u_btd, sequence, tails))
        window, _ = self.projections.keys_values(u_btd, sequence, tails)
        num_past, end = 0, sequence.start + sequence.num_tokens
        if state is not None:
            if sequence.start:  # at the beginning there is nothing to join
                past = state.before(sequence.start)
                num_past = min(sequence.start, past.k.shape[1])
                window = window.behind(past)
            state.refill(window, end)
        out_bthp = memory_attention(
            q_bthp,
            *window,
            window_size=self.window_size(self.config, end),
            doc_ids_bt=sequence.doc_ids_bt,
            num_past=num_past,
        )
        return MixerOutput(self.out_proj(out_bthp.flatten(-2)))

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable, state: RingCache) -> Tensor:
        projections = self.projections
        queries, keys_values = project_each(u_bd, projections.q_proj, projections.kv_proj)
        queries, keys_values = projections.with_neighbours(queries, keys_values, state.conv)
        q_bhp, (k_bhp, v_bhp) = projections.as_queries(queries), projections.as_keys_values(keys_values)
        state.make_room(position_b)
        rings = Rings(state.k, state.v)
        q_bhp = memory_write(q_bhp, k_bhp, v_bhp, position_b, rotary.cos_sin, far=None, rings=rings)[0]
        out_bhp = memory_attention_step(q_bhp, state.k, state.v, window_size=state.k.shape[1], position_b=position_b)
        return self.out_proj(out_bhp.flatten(-2))

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> RingCache:
        size = self.window_size(self.config, num_tokens=0)
        cache = self.CACHE.empty(self.projections, batch_size, size, device, dtype)
        cache.conv = self.projections.init_tails(batch_size, device, dtype)
        return cache


class SlidingWindowAttention(Attention):
    """Attention to the last window_size tokens, the current one included."""

    CACHE = RingCache

    @staticmethod
    def window_size(config: ModelFields, num_tokens: int) -> int:
        return config.window_size


def mean_keys(seq_len: int, window_size: int) -> float:
    """Keys in a causal window, averaged over positions."""
    w = min(window_size, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
