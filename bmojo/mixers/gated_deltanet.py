"""Gated DeltaNet (arXiv:2412.06464): a memory that fades as Mamba-2's does, and replaces what it holds under a key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.fields import ModelFields
from bmojo.layers import Linear, RMSNorm, RotaryTable, halves, parts
from bmojo.mixers.base import Mixer, MixerCounts, MixerOutput, Sequence
from bmojo.mixers.ssm import SSMState, init_dt_bias
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.gated_delta_rule import flops_per_position, gated_delta_rule, gated_delta_step
from kernels.pointwise import gated

UNIT_EPS = 1e-6  # added to the squared length of queries and keys


class Widths(NamedTuple):
    """Sizes of a layer that follow from the config."""

    inner: int  # values of all heads
    num_heads: int
    conv_channels: int  # q, k and v


class GatedDeltaNet(Mixer[SSMState]):
    """u -> (z, qkv, a, b); conv + SiLU on q, k, v; |q| = |k| = 1; the delta rule; RMSNorm(y) * SiLU(z); out-projection.

    Its fields are Mamba-2's. A head has d_state channels for queries and keys, and ssm_head_dim for values.
    """

    FLOAT32 = ("A_log", "dt_bias")

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.d_inner, self.num_heads, self.conv_channels = self.widths(config)
        self.head_dim, self.d_state = config.ssm_head_dim, config.d_state
        in_features = self.d_inner + self.conv_channels + 2 * self.num_heads
        self.in_proj = Linear(config.d_model, in_features, config.init_std)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_channels, config.conv_width))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = Linear(self.d_inner, config.d_model, config.residual_std)

    @classmethod
    def widths(cls, config: ModelFields) -> Widths:
        inner = config.ssm_expand * config.d_model
        num_heads = inner // config.ssm_head_dim
        return Widths(inner, num_heads, 2 * num_heads * config.d_state + inner)

    @classmethod
    def check(cls, config: ModelFields) -> None:
        inner = cls.widths(config).inner
        if inner % config.ssm_head_dim:
            raise ValueError(
                f"ssm_expand * d_model = {inner} is not a multiple of ssm_head_dim={config.ssm_head_dim}; change one."
            )

    @classmethod
    def counts(cls, config: ModelFields, seq_len: int) -> MixerCounts:
        """The rule counts what its chunked form needs."""
        inner, num_heads, conv_channels = cls.widths(config)
        d, n, p = config.d_model, config.d_state, config.ssm_head_dim
        projections = d * (inner + conv_channels + 2 * num_heads) + inner * d
        return MixerCounts(
            params={"delta": projections + conv_channels * config.conv_width + 2 * num_heads + p},
            flops={"delta_projections": 2.0 * projections, "delta_rule": num_heads * flops_per_position(n, p)},
            state_bytes=4 * ((config.conv_width - 1) * conv_channels + inner * n),
        )

    def init_weights(self, generator: torch.Generator) -> None:
        """As Mamba-2; see the table in bmojo.model."""
        config = self.config
        bound = config.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound, generator=generator)
        init_dt_bias(self.dt_bias, config, generator)
        nn.init.uniform_(self.A_log, config.a_min, config.a_max, generator=generator)
        with torch.no_grad():
            self.A_log.log_()

    def forward(self, u_btd: Tensor, sequence: Sequence, state: SSMState | None = None) -> MixerOutput:
        z_bti, conv_in_btc, log_decay_bth, beta_bth = self._project(u_btd)
        past = None if state is None else state.conv
        conv_out_btc, tail = causal_conv1d(conv_in_btc, self.conv_weight, past, sequence.doc_ids_bt)
        q_bthn, k_bthn, v_bthp = self._conv_parts(conv_out_btc)
        initial = None if state is None else state.ssm
        y_bthp, final = gated_delta_rule(q_bthn, k_bthn, v_bthp, log_decay_bth, beta_bth, initial, sequence.doc_ids_bt)
        if state is not None:
            state.conv.copy_(tail)
            state.ssm.copy_(final)
        return MixerOutput(self._gated_out(y_bthp, z_bti))

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable, state: SSMState) -> Tensor:
        z_bi, conv_in_bc, log_decay_bh, beta_bh = self._project(u_bd)
        conv_out_bc = causal_conv1d_step(conv_in_bc, self.conv_weight, state.conv)
        q_bhn, k_bhn, v_bhp = self._conv_parts(conv_out_bc)
        y_bhp = gated_delta_step(q_bhn, k_bhn, v_bhp, log_decay_bh, beta_bh, state.ssm)
        return self._gated_out(y_bhp.to(u_bd.dtype), z_bi)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> SSMState:
        width = self.config.conv_width
        precise = torch.promote_types(dtype, torch.float32)
        heads = (self.num_heads, self.head_dim, self.d_state)
        return SSMState(
            conv=torch.zeros(batch_size, width - 1, self.conv_channels, dtype=dtype, device=device),
            ssm=torch.zeros(batch_size, *heads, dtype=precise, device=device),
        )

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, the convolution's input, log a and b; the gates in float32 at least."""
        z, conv_in, gates = self.in_proj.parts(u, (self.d_inner, self.conv_channels, 2 * self.num_heads))
        a, b = halves(gates.to(torch.promote_types(gates.dtype, self.A_log.dtype)))
        return z, conv_in, -torch.exp(self.A_log) * F.softplus(a + self.dt_bias), torch.sigmoid(b)

    def _conv_parts(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.num_heads * self.d_state
        q, k, v = parts(conv_out, (keys, keys, self.d_inner))
        by_head = (self.num_heads, self.d_state)
        return unit(q.unflatten(-1, by_head)), unit(k.unflatten(-1, by_head)), v.unflatten(-1, (self.num_heads, -1))

    def _gated_out(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(gated(self.norm(y).flatten(-2), z))


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
