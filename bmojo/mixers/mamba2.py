"""Mamba-2 (arXiv:2405.21060): a selective state-space model with one decay per head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.fields import ModelFields
from bmojo.layers import Linear, RMSNorm, parts
from bmojo.mixers.base import MixerCounts, MixerOutput, Sequence
from bmojo.mixers.recurrent import RecurrentMixer
from bmojo.mixers.ssm import SSMState, corrected, delta_error, held
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.cpp.constants import SSD_CHUNK
from kernels.ssd_scan import ssd_scan, ssd_step


class Mamba2(RecurrentMixer):
    """u -> (z, x, B, C, dt); conv + SiLU on x, B, C; the scan; RMSNorm(y * SiLU(z)); out-projection."""

    FLOAT32 = ("A_log", "D", "dt_bias")

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.num_groups = config.ssm_num_groups
        in_features = self.d_inner + self.conv_channels + self.num_heads
        self.in_proj = Linear(config.d_model, in_features, config.init_std)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_channels, config.conv_width))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(self.d_inner, config.norm_eps)
        self.out_proj = Linear(self.d_inner, config.d_model, self.out_std(config))

    @classmethod
    def num_maps(cls, config: ModelFields, num_heads: int) -> int:
        return config.ssm_num_groups

    @classmethod
    def check(cls, config: ModelFields) -> None:
        super().check(config)
        num_heads = cls.widths(config).num_heads
        if num_heads % config.ssm_num_groups:
            raise ValueError(
                f"{num_heads} SSM heads ({cls.expand(config)[0]} * d_model / ssm_head_dim) are not a multiple of "
                f"ssm_num_groups={config.ssm_num_groups}; change one."
            )

    @classmethod
    def counts(cls, config: ModelFields, seq_len: int) -> MixerCounts:
        """The scan counts what its chunked form needs."""
        inner, num_heads, conv_channels = cls.widths(config)
        d, n = config.d_model, config.d_state
        projections = d * (inner + conv_channels + num_heads) + inner * d
        within = SSD_CHUNK * (config.ssm_num_groups * n + inner)
        across = 2 * inner * n
        intervals = SSD_CHUNK * (SSD_CHUNK + 1) * num_heads
        return MixerCounts(
            params={"ssm": projections + conv_channels * config.conv_width + 3 * num_heads + inner},
            flops={"ssm_projections": 2.0 * projections, "ssm_scan": 2.0 * (within + across + intervals)},
            state_bytes=cls.num_state_bytes(config),
        )

    def init_weights(self, generator: torch.Generator) -> None:
        """See the table in bmojo.model."""
        super().init_weights(generator)
        nn.init.ones_(self.D)

    def forward(self, u_btd: Tensor, sequence: Sequence, state: SSMState | None = None) -> MixerOutput:
        z_bti, conv_in_btc, dt_bth = self._project(u_btd)
        past = None if state is None else state.conv
        conv_out_btc, tail = causal_conv1d(conv_in_btc, self.conv_weight, past, sequence.doc_ids_bt)
        x_bthp, B_btgn, C_btgn = self._conv_parts(conv_out_btc)
        initial = None if state is None else state.ssm
        A_h = -torch.exp(self.A_log)
        y_bthp, final = ssd_scan(x_bthp, dt_bth, A_h, B_btgn, C_btgn, self.D, initial, sequence.doc_ids_bt)
        error_bt = None
        if sequence.delta_error:  # with B as the key and x as the value

            def read(queries: Tensor) -> Tensor:
                no_skip = torch.zeros_like(self.D)
                return ssd_scan(x_bthp, dt_bth, A_h, B_btgn, queries, no_skip, initial, sequence.doc_ids_bt).y_bthp

            decay_bth = torch.exp(dt_bth * A_h)
            error_bt = delta_error(read, B_btgn, x_bthp, decay_bth, dt_bth, initial, sequence.doc_ids_bt)
        if state is not None:
            state.conv.copy_(tail)
            state.ssm.copy_(final)
        return MixerOutput(self._gated_out(y_bthp.flatten(-2), z_bti), delta_error_bt=error_bt)

    def step_of_projected(
        self, projected: Tensor, state: SSMState, delta_error: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        z_bi, conv_in_bc, dt_bh = parts(projected, self._in_widths)
        conv_out_bc = causal_conv1d_step(conv_in_bc, self.conv_weight, state.conv)
        x_bhp, B_bgn, C_bgn = self._conv_parts(conv_out_bc)
        error_b = None
        if delta_error:
            share_bh = self._step_size(dt_bh)
            decay_bh = torch.exp(share_bh * -torch.exp(self.A_log))
            error_b = corrected(x_bhp, held(state.ssm, B_bgn), decay_bh, share_bh)
        y_bhp = ssd_step(x_bhp, dt_bh, self.dt_bias, self.A_log, B_bgn, C_bgn, self.D, state.ssm)
        return self._gated_out(y_bhp.to(projected.dtype).flatten(-2), z_bi), error_b

    def log_decay(self, u_btd: Tensor) -> Tensor:
        """log of what these tokens leave of the state before them: the sum over t of dt_t A, [b, h]."""
        _, _, dt_bth = self._project(u_btd)
        return -(dt_bth.sum(1) * torch.exp(self.A_log))

    @property
    def _in_widths(self) -> tuple[int, int, int]:
        return self.d_inner, self.conv_channels, self.num_heads

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, conv_in, dt = self.in_proj.parts(u, self._in_widths)
        return z, conv_in, self._step_size(dt)

    def _step_size(self, dt: Tensor) -> Tensor:
        """dt of what the projection gives for it."""
        precise = torch.promote_types(dt.dtype, self.dt_bias.dtype)
        return F.softplus(dt.to(precise) + self.dt_bias)

    def _conv_parts(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.num_groups * self.d_state
        x, B, C = parts(conv_out, (self.d_inner, maps, maps))
        by_group = (self.num_groups, self.d_state)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), B.unflatten(-1, by_group), C.unflatten(-1, by_group)

    def _gated_out(self, y: Tensor, z: Tensor) -> Tensor:
        return self.norm.projected(y, z, self.out_proj)
