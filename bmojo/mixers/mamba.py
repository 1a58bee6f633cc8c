"""Mamba (arXiv:2312.00752): a selective state-space model with a diagonal state for every channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.fields import ModelFields
from bmojo.layers import Linear, RotaryTable, halves
from bmojo.mixers.base import Mixer, MixerCounts, MixerOutput, Sequence
from bmojo.mixers.ssm import SSMState, init_dt_bias
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.pointwise import gated
from kernels.selective_scan import selective_scan


class Mamba(Mixer[SSMState]):
    """u -> (x, z); conv + SiLU on x; dt, B, C from x; the scan; y * SiLU(z); out-projection."""

    FLOAT32 = ("A_log", "D", "dt_bias")
    NOT_FLOAT8 = ("x_proj", "dt_proj")  # few columns, which decide how the state decays

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.d_inner = config.ssm_expand * config.d_model
        self.d_state, self.dt_rank = config.mamba_d_state, config.dt_rank
        self.in_proj = Linear(config.d_model, 2 * self.d_inner, config.init_std)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, config.conv_width))
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * self.d_state, config.init_std)
        self.dt_proj = Linear(self.dt_rank, self.d_inner, config.init_std)
        self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = Linear(self.d_inner, config.d_model, config.residual_std)

    @classmethod
    def check(cls, config: ModelFields) -> None:
        """Any fields will do."""

    @classmethod
    def counts(cls, config: ModelFields, seq_len: int) -> MixerCounts:
        d, n, rank, inner = config.d_model, config.mamba_d_state, config.dt_rank, config.ssm_expand * config.d_model
        projections = d * 2 * inner + inner * (rank + 2 * n) + rank * inner + inner * d
        return MixerCounts(
            params={"ssm": projections + inner * config.conv_width + inner * n + 2 * inner},
            flops={"ssm_projections": 2.0 * projections, "ssm_scan": 6.0 * inner * n},
            state_bytes=4 * inner * (config.conv_width - 1 + n),
        )

    def init_weights(self, generator: torch.Generator) -> None:
        """See the table in bmojo.model."""
        bound = self.config.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound, generator=generator)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound, generator=generator)
        init_dt_bias(self.dt_bias, self.config, generator)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, u_btd: Tensor, sequence: Sequence, state: SSMState | None = None) -> MixerOutput:
        x_bti, z_bti = halves(self.in_proj(u_btd))
        past = None if state is None else state.conv
        x_bti, tail = causal_conv1d(x_bti, self.conv_weight, past, sequence.doc_ids_bt)
        dt_bti, B_btn, C_btn = self._selection(x_bti)
        initial = None if state is None else state.ssm
        A_in = -torch.exp(self.A_log)
        y_bti, final = selective_scan(x_bti, dt_bti, A_in, B_btn, C_btn, self.D, initial, sequence.doc_ids_bt)
        if state is not None:
            state.conv.copy_(tail)
            state.ssm.copy_(final)
        return MixerOutput(self.out_proj(gated(y_bti, z_bti)))

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable, state: SSMState) -> Tensor:
        x_bi, z_bi = self.in_proj(u_bd).chunk(2, -1)
        x_bi = causal_conv1d_step(x_bi, self.conv_weight, state.conv)
        dt_bi, B_bn, C_bn = self._selection(x_bi)
        ssm = state.ssm
        decay_bin = torch.exp(dt_bi[..., None] * -torch.exp(self.A_log)).to(ssm.dtype)
        write_bin = (dt_bi * x_bi)[..., None] * B_bn[:, None, :]
        ssm.mul_(decay_bin).add_(write_bin.to(ssm.dtype))
        y_bi = (ssm @ C_bn.to(ssm.dtype)[..., None])[..., 0] + self.D * x_bi
        return self.out_proj(gated(y_bi.to(u_bd.dtype), z_bi))

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> SSMState:
        precise = torch.promote_types(dtype, torch.float32)
        past = self.config.conv_width - 1
        return SSMState(
            conv=torch.zeros(batch_size, past, self.d_inner, dtype=dtype, device=device),
            ssm=torch.zeros(batch_size, self.d_inner, self.d_state, dtype=precise, device=device),
        )

    def _selection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dt, B, C = self.x_proj.parts(x, (self.dt_rank, self.d_state, self.d_state))
        dt = self.dt_proj(dt)
        return F.softplus(dt.to(torch.promote_types(dt.dtype, self.dt_bias.dtype)) + self.dt_bias), B, C
