"""Softmax attention with RoPE: over everything before (`attention`) or over a sliding window (`swa`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmojo.config import ModelConfig
from bmojo.layers import Linear, RMSNorm, RotaryTable
from bmojo.mixers import ring
from bmojo.mixers.base import Mixer, MixerOutput, Sequence
from bmojo.state import LayerState
from kernels.memory_attention import memory_attention, memory_attention_step


class Projections(nn.Module):
    """Queries from u, keys and values from whatever stands in memory; optional RMSNorm on queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.attention_head_dim
        self.q_proj = Linear(config.d_model, self.num_heads * self.head_dim)
        self.kv_proj = Linear(config.d_model, 2 * self.kv_heads * self.head_dim)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def queries(self, u: Tensor) -> Tensor:
        q = self.q_proj(u).unflatten(-1, (self.num_heads, self.head_dim))
        return q if self.q_norm is None else self.q_norm(q)

    def keys_values(self, u: Tensor, rotary: RotaryTable, proj: Linear | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys rotated to their positions, keys as they are, and values."""
        keys_values = (proj or self.kv_proj)(u).unflatten(-1, (2 * self.kv_heads, self.head_dim))
        if self.k_norm is None:
            return rotary.rotate_keys(keys_values)
        k, v = keys_values.chunk(2, -2)
        k = self.k_norm(k)
        return rotary.rotate(k), k, v


class Attention(Mixer):
    """window_size None: full causal attention, whose decoding state grows with every token."""

    def __init__(self, config: ModelConfig, window_size: int | None) -> None:
        super().__init__(config)
        self.window_size = window_size
        self.projections = Projections(config)
        self.out_proj = Linear(config.num_heads * config.attention_head_dim, config.d_model)

    def forward(self, u_btd: Tensor, sequence: Sequence, state: LayerState | None = None) -> MixerOutput:
        assert sequence.rotary is not None
        q = sequence.rotary.rotate(self.projections.queries(u_btd))
        k, _, v = self.projections.keys_values(u_btd, sequence.rotary)
        num_past, end = 0, sequence.start + sequence.num_tokens
        if state is not None:
            if self.window_size is None:
                past = state["k"][:, : sequence.start], state["v"][:, : sequence.start]
            else:
                past = ring.in_order(state["k"], sequence.start), ring.in_order(state["v"], sequence.start)
            k, v = (torch.cat([old.to(new.dtype), new], 1) for old, new in zip(past, (k, v), strict=True))
            num_past = min(sequence.start, past[0].shape[1])
            if self.window_size is None:
                state["k"], state["v"] = k.to(state["k"].dtype), v.to(state["v"].dtype)
            else:
                ring.refill(state["k"], k, end)
                ring.refill(state["v"], v, end)
        out_bthp = memory_attention(
            q, k, v, window_size=self.window_size or end, doc_ids_bt=sequence.doc_ids_bt, num_past=num_past
        )
        return MixerOutput(self.out_proj(out_bthp.flatten(-2)))

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable | None, state: LayerState) -> Tensor:
        assert rotary is not None
        q = rotary.rotate(self.projections.queries(u_bd))
        k, _, v = self.projections.keys_values(u_bd, rotary)
        if self.window_size is None:
            _grow(state, int(position_b.max()) + 1)
        ring.write(state, position_b, {"k": k, "v": v})
        out_bhp = memory_attention_step(
            q, state["k"], state["v"], window_size=state["k"].shape[1], position_b=position_b
        )
        return self.out_proj(out_bhp.flatten(-2))

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        kv = (self.projections.kv_heads, self.projections.head_dim)
        return {name: ring.zeros(batch_size, self.window_size or 0, *kv, dtype, device) for name in ("k", "v")}


def _grow(state: LayerState, num_tokens: int) -> None:
    """Double the room of a full-attention cache until it holds `num_tokens`; slots are positions."""
    capacity = state["k"].shape[1]
    if num_tokens > capacity:
        room = max(64, 2 * capacity, num_tokens) - capacity
        for name in ("k", "v"):
            old = state[name]
            state[name] = torch.cat([old, old.new_zeros(old.shape[0], room, *old.shape[2:])], 1)
