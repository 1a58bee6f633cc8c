"""Gated DeltaNet (arXiv:2412.06464): a memory that fades as Mamba-2's does, and replaces what it holds under a key."""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.fields import ModelFields
from bmojo.layers import halves
from bmojo.mixers.delta import DeltaMixer, Gates, log_decay
from kernels.gated_delta_rule import flops_per_position, gated_delta_rule, gated_delta_step
from kernels.pointwise import gated


class GatedDeltaNet(DeltaMixer):
    """u -> (z, qkv, a, b); one decay per head, of a; the share that is written, of b; RMSNorm(y) * SiLU(z)."""

    @classmethod
    def in_widths(cls, config: ModelFields) -> tuple[int, int, int]:
        inner, num_heads, conv_channels = cls.widths(config)
        return inner, conv_channels, 2 * num_heads

    @classmethod
    def num_decays(cls, config: ModelFields) -> int:
        return cls.widths(config).num_heads

    @classmethod
    def rule_flops(cls, config: ModelFields) -> float:
        return flops_per_position(config.d_state, config.ssm_head_dim)

    def gates(self, low: Tensor, rest: Tensor) -> Gates:
        a, b = halves(self.precise(rest))
        return Gates(log_decay(self.A_log, a + self.dt_bias), torch.sigmoid(b), low)

    def rule(
        self, qkv: tuple[Tensor, Tensor, Tensor], gates: Gates, initial: Tensor | None, doc_ids_bt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(*qkv, gates.log_decay, gates.beta, initial, doc_ids_bt)

    def rule_step(self, qkv: tuple[Tensor, Tensor, Tensor], gates: Gates, state: Tensor) -> Tensor:
        return gated_delta_step(*qkv, gates.log_decay, gates.beta, state)

    def gated_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(gated(self.norm(y).flatten(-2), gate))
