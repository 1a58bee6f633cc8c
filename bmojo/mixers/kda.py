"""Kimi Delta Attention (arXiv:2510.26692): Gated DeltaNet whose memory fades channel by channel of its keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bmojo.fields import ModelFields
from bmojo.layers import Linear, parts
from bmojo.mixers.delta import DeltaMixer, Gates
from kernels.channel_delta_rule import channel_delta_rule, channel_delta_step, flops_per_position


class KimiDeltaAttention(DeltaMixer):
    """u -> (z, qkv, a, b), where z and a have rank ssm_head_dim; one decay per channel of the keys, of a; the share
    that is written, of b; RMSNorm(y) * sigmoid(z)."""

    NOT_FLOAT8 = ("gate_proj", "decay_proj")  # they read few columns

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.gate_proj = Linear(self.head_dim, self.d_inner, config.init_std)
        self.decay_proj = Linear(self.head_dim, self.num_decays(config), config.init_std)

    @classmethod
    def in_widths(cls, config: ModelFields) -> tuple[int, int, int]:
        _, num_heads, conv_channels = cls.widths(config)
        return config.ssm_head_dim, conv_channels, config.ssm_head_dim + num_heads

    @classmethod
    def num_decays(cls, config: ModelFields) -> int:
        return cls.widths(config).num_heads * config.d_state

    @classmethod
    def num_projections(cls, config: ModelFields) -> int:
        from_rank = config.ssm_head_dim * (cls.widths(config).inner + cls.num_decays(config))
        return super().num_projections(config) + from_rank

    @classmethod
    def rule_flops(cls, config: ModelFields) -> float:
        return flops_per_position(config.d_state, config.ssm_head_dim)

    def gates(self, low: Tensor, rest: Tensor) -> Gates:
        a_low, b, _ = parts(rest, (self.head_dim, self.num_heads, 0))
        a = self.precise(self.decay_proj(a_low)) + self.dt_bias
        # softplus before the heads are parted: its compiled gradient is laid out otherwise than torch.compile expects.
        by_head = F.softplus(a).unflatten(-1, (self.num_heads, self.d_state))
        decay = -torch.exp(self.A_log[:, None]) * by_head
        return Gates(decay, torch.sigmoid(self.precise(b)), self.gate_proj(low))

    def rule(
        self, qkv: tuple[Tensor, Tensor, Tensor], gates: Gates, initial: Tensor | None, doc_ids_bt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return channel_delta_rule(*qkv, gates.log_decay, gates.beta, initial, doc_ids_bt)

    def rule_step(self, qkv: tuple[Tensor, Tensor, Tensor], gates: Gates, state: Tensor) -> Tensor:
        return channel_delta_step(*qkv, gates.log_decay, gates.beta, state)

    def gated_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(self.norm(y).flatten(-2) * torch.sigmoid(gate))
