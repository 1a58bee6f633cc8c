"""Mamba-2 (arXiv:2405.21060): a selective state-space model, one decay a head. Also B'MOJO's fading memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.config import ModelConfig
from bmojo.layers import Linear, RMSNorm, RotaryTable
from bmojo.mixers.base import Mixer, MixerOutput, Sequence
from bmojo.state import LayerState
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.pointwise import split
from kernels.ssd_scan import ssd_scan, ssd_step


class Mamba2(Mixer):
    """u -> (z, x, B, C, dt); conv + SiLU on x, B, C; the scan; RMSNorm(y * SiLU(z)); out-projection."""

    def __init__(self, config: ModelConfig, expand: int) -> None:
        super().__init__(config)
        self.head_dim, self.d_state, self.num_groups = config.ssm_head_dim, config.d_state, config.ssm_num_groups
        self.d_inner = config.ssm_inner_width(expand)
        self.num_heads = self.d_inner // self.head_dim
        self.conv_channels = self.d_inner + 2 * self.num_groups * self.d_state
        self.in_proj = Linear(config.d_model, self.d_inner + self.conv_channels + self.num_heads)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_channels, config.conv_width))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(self.d_inner, config.norm_eps)
        self.out_proj = Linear(self.d_inner, config.d_model)

    def init_ssm(self, generator: torch.Generator) -> None:
        """Set the parameters that are no matrices; see the table in bmojo.model."""
        config = self.config
        bound = config.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound, generator=generator)
        init_dt_bias(self.dt_bias, config, generator)
        nn.init.uniform_(self.A_log, config.a_min, config.a_max, generator=generator)
        with torch.no_grad():
            self.A_log.log_()
        nn.init.ones_(self.D)

    def forward(self, u_btd: Tensor, sequence: Sequence, state: LayerState | None = None) -> MixerOutput:
        z_bti, conv_in_btc, dt_bth = self._project(u_btd)
        past = None if state is None else state["conv"]
        conv_out_btc, tail = causal_conv1d(conv_in_btc, self.conv_weight, past, sequence.doc_ids_bt)
        x_bthp, B_btgn, C_btgn = self._split(conv_out_btc)
        initial = None if state is None else state["ssm"]
        A_h = -torch.exp(self.A_log)
        y_bthp, final = ssd_scan(x_bthp, dt_bth, A_h, B_btgn, C_btgn, self.D, initial, sequence.doc_ids_bt)
        if state is not None:
            state["conv"].copy_(tail)
            state["ssm"].copy_(final)
        return MixerOutput(self._gated_out(y_bthp.flatten(-2), z_bti))

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable | None, state: LayerState) -> Tensor:
        z_bi, conv_in_bc, dt_bh = self._project(u_bd)
        conv_out_bc = causal_conv1d_step(conv_in_bc, self.conv_weight, state["conv"])
        x_bhp, B_bgn, C_bgn = self._split(conv_out_bc)
        y_bhp = ssd_step(x_bhp, dt_bh, -torch.exp(self.A_log), B_bgn, C_bgn, self.D, state["ssm"])
        return self._gated_out(y_bhp.to(u_bd.dtype).flatten(-2), z_bi)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        width = self.config.conv_width
        precise = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch_size, width - 1, self.conv_channels, dtype=dtype, device=device),
            "ssm": torch.zeros(batch_size, self.num_heads, self.head_dim, self.d_state, dtype=precise, device=device),
        }

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, conv_in, dt = split(self.in_proj(u), (self.d_inner, self.conv_channels, self.num_heads))
        precise = torch.promote_types(dt.dtype, self.dt_bias.dtype)
        return z, conv_in, F.softplus(dt.to(precise) + self.dt_bias)

    def _split(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.num_groups * self.d_state
        x, B, C = split(conv_out, (self.d_inner, maps, maps))
        by_group = (self.num_groups, self.d_state)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), B.unflatten(-1, by_group), C.unflatten(-1, by_group)

    def _gated_out(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(self.norm(y, gate=z))


def init_dt_bias(dt_bias: nn.Parameter, config: ModelConfig, generator: torch.Generator) -> None:
    """Choose the bias so that softplus(bias) is log-uniform in [dt_min, dt_max]."""
    with torch.no_grad():
        nn.init.uniform_(dt_bias, math.log(config.dt_min), math.log(config.dt_max), generator=generator)
        dt = dt_bias.exp().clamp_min(1e-4)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
