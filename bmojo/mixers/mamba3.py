"""Mamba-3 (arXiv:2603.15569), one input and one output per head: rotating maps, and writes that also weigh the past."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.fields import ModelFields
from bmojo.layers import Linear, RMSNorm, RotaryTable, parts
from bmojo.mixers.base import Mixer, MixerCounts, MixerOutput, Sequence
from bmojo.mixers.mamba2 import Mamba2
from bmojo.mixers.ssm import init_dt_bias
from bmojo.state import LayerState
from kernels.cpp.constants import SSD_CHUNK
from kernels.pointwise import gated
from kernels.ssd_scan import ssd_scan

LEAST_RATE = 1e-4  # of decay
TINY = 1e-12  # of a decay's exponent: less is none, and keeps quotients finite


@dataclass
class Mamba3State(LayerState):
    """The state, the last token's input map (rotated) and input, and the sum of angles so far, in float32 at least."""

    ssm: Tensor  # [b, h, p, n]
    k: Tensor  # [b, h, n]
    v: Tensor  # [b, h, p]
    angle: Tensor  # [b, h, a]


class Projected(NamedTuple):
    """What the input is projected to; all but `gate` in float32 at least."""

    gate: Tensor  # z
    x: Tensor  # [..., h, p]
    B: Tensor  # [..., h, n], normed, with bias, not rotated
    C: Tensor
    log_decay: Tensor  # [..., h], below 0
    now: Tensor  # [..., h]: the weight of a token's own write
    before: Tensor  # [..., h]: that of the write before it
    turn: Tensor  # [..., h, a]: by how much B and C turn


class Mamba3(Mixer[Mamba3State]):
    """u -> (z, xBC, rates, angles); norm and bias on B, C, which turn; the scan; y * SiLU(z); out-projection.

    Half of d_state turns, in pairs of neighbours. There is no convolution: a token's write is weighed with the one
    before it.
    """

    FLOAT32 = ("dt_bias", "D", "B_bias", "C_bias")

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.d_inner, self.num_heads, _ = Mamba2.widths(config)
        self.in_proj = Linear(config.d_model, sum(self.in_widths(config)), config.init_std)
        self.B_norm = RMSNorm(config.d_state, config.norm_eps)
        self.C_norm = RMSNorm(config.d_state, config.norm_eps)
        self.B_bias = nn.Parameter(torch.empty(self.num_heads, config.d_state))
        self.C_bias = nn.Parameter(torch.empty(self.num_heads, config.d_state))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.out_proj = Linear(self.d_inner, config.d_model, config.residual_std)

    @classmethod
    def check(cls, config: ModelFields) -> None:
        Mamba2.check(config)
        if config.d_state % 4:
            raise ValueError(f"d_state={config.d_state} is not a multiple of 4: mamba3 turns half of it, in pairs.")

    @classmethod
    def num_angles(cls, config: ModelFields) -> int:
        return config.d_state // 4

    @classmethod
    def in_widths(cls, config: ModelFields) -> tuple[int, int, int]:
        inner, num_heads, conv_channels = Mamba2.widths(config)
        return inner, conv_channels, 3 * num_heads + cls.num_angles(config)

    @classmethod
    def counts(cls, config: ModelFields, seq_len: int) -> MixerCounts:
        """The scan counts what its chunked form needs, twice the heads; and so does the sum of angles, another scan."""
        inner, num_heads, _ = Mamba2.widths(config)
        d, n, angles = config.d_model, config.d_state, num_heads * cls.num_angles(config)
        projections = d * (sum(cls.in_widths(config)) + inner)
        scan = 2 * (SSD_CHUNK * (num_heads * n + inner) + 2 * inner * n)
        turns = SSD_CHUNK * (1 + angles) + 2 * angles
        intervals = 3 * SSD_CHUNK * (SSD_CHUNK + 1) * num_heads
        return MixerCounts(
            params={"ssm": projections + 2 * num_heads * (n + 1) + 2 * n},
            flops={"ssm_projections": 2.0 * projections, "ssm_scan": 2.0 * (scan + turns + intervals)},
            state_bytes=4 * (inner * n + num_heads * n + inner + angles),
        )

    def init_weights(self, generator: torch.Generator) -> None:
        """See the table in bmojo.model."""
        init_dt_bias(self.dt_bias, self.config, generator)
        for ones in (self.D, self.B_bias, self.C_bias):
            nn.init.ones_(ones)

    def forward(self, u_btd: Tensor, sequence: Sequence, state: Mamba3State | None = None) -> MixerOutput:
        of = self._projected(*self.in_proj.parts(u_btd, self.in_widths(self.config)))
        docs_bt = sequence.doc_ids_bt
        angle_btha, last_angle = summed(of.turn, None if state is None else state.angle, docs_bt)
        B_bthn, C_bthn = turned(of.B, angle_btha), turned(of.C, angle_btha)
        y_bthp, final = self._scan(of, B_bthn, C_bthn, state, docs_bt)
        if state is not None:
            state.ssm.copy_(final)
            state.k.copy_(B_bthn[:, -1])
            state.v.copy_(of.x[:, -1])
            state.angle.copy_(last_angle)
        return MixerOutput(self._out(y_bthp, of))

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable, state: Mamba3State) -> Tensor:
        of = self._projected(*parts(self.in_proj(u_bd), self.in_widths(self.config)))
        state.angle.copy_(within_a_turn(state.angle + of.turn))
        B_bhn, C_bhn = turned(of.B, state.angle), turned(of.C, state.angle)
        state.ssm.add_(outer(of.before[..., None] * state.v, state.k)).mul_(torch.exp(of.log_decay)[..., None, None])
        state.ssm.add_(outer(of.now[..., None] * of.x, B_bhn))
        state.k.copy_(B_bhn)
        state.v.copy_(of.x)
        return self._out((state.ssm @ C_bhn.to(state.ssm.dtype)[..., None])[..., 0], of)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Mamba3State:
        precise, h, config = torch.promote_types(dtype, torch.float32), self.num_heads, self.config
        sizes = ((config.ssm_head_dim, config.d_state), (config.d_state,), (config.ssm_head_dim,))
        return Mamba3State(
            *(
                torch.zeros(batch_size, h, *size, dtype=precise, device=device)
                for size in (*sizes, (self.num_angles(config),))
            )
        )

    def _projected(self, z: Tensor, x_B_C: Tensor, rest: Tensor) -> Projected:
        config, h = self.config, self.num_heads
        maps = config.ssm_num_groups * config.d_state
        x, B, C = parts(x_B_C, (self.d_inner, maps, maps))
        precise = torch.promote_types(rest.dtype, self.dt_bias.dtype)
        steps, share, angle = parts(rest.to(precise), (2 * h, h, self.num_angles(config)))
        dt, rate, _ = parts(steps, (h, h, 0))
        dt, share = F.softplus(dt + self.dt_bias), torch.sigmoid(share)
        return Projected(
            gate=z,
            x=x.unflatten(-1, (h, config.ssm_head_dim)).to(precise),
            B=self._by_head(B, self.B_norm).to(precise) + self.B_bias,
            C=self._by_head(C, self.C_norm).to(precise) + self.C_bias,
            log_decay=dt * (-F.softplus(rate)).clamp_max(-LEAST_RATE),
            now=share * dt,
            before=(1 - share) * dt,
            turn=math.pi * torch.tanh(angle)[..., None, :] * dt[..., None],
        )

    def _by_head(self, maps: Tensor, norm: RMSNorm) -> Tensor:
        groups = self.config.ssm_num_groups
        return norm(maps.unflatten(-1, (groups, self.config.d_state))).repeat_interleave(self.num_heads // groups, -2)

    def _scan(
        self, of: Projected, B: Tensor, C: Tensor, state: Mamba3State | None, docs_bt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One scan of twice the heads: those that write a token, and those that write the one before it. Both decay
        alike, so their sum is the state."""
        rate_bth = (-of.log_decay).clamp_min(TINY)
        own, earlier = of.now / rate_bth, of.before * torch.exp(of.log_decay) / rate_bth
        before_x = previous(of.x, None if state is None else state.v, docs_bt)
        before_B = previous(B, None if state is None else state.k, docs_bt)
        x = torch.cat([of.x * own[..., None], before_x * earlier[..., None]], 2)
        both = (torch.cat([rate_bth, rate_bth], 2), -torch.ones_like(self.D).repeat(2))
        maps = (torch.cat([B, before_B], 2), torch.cat([C, C], 2), torch.zeros_like(self.D).repeat(2))
        initial = None if state is None else torch.cat([state.ssm, torch.zeros_like(state.ssm)], 1)
        y, final = ssd_scan(x, *both, *maps, initial, docs_bt)
        by_write = (2, self.num_heads)
        return y.unflatten(2, by_write).sum(2), final.unflatten(1, by_write).sum(1)

    def _out(self, y: Tensor, of: Projected) -> Tensor:
        y = (y + self.D[:, None] * of.x).flatten(-2)
        return self.out_proj(gated(y.to(of.gate.dtype), of.gate))


def previous(x_bth: Tensor, before_bh: Tensor | None, docs_bt: Tensor | None) -> Tensor:
    """x of one position earlier, zero if that is another document; `before` is that of the first."""
    first_b1h = torch.zeros_like(x_bth[:, :1]) if before_bh is None else before_bh[:, None].to(x_bth.dtype)
    earlier_bth = torch.cat([first_b1h, x_bth[:, :-1]], 1)
    if docs_bt is None:
        return earlier_bth
    same_bt = F.pad(docs_bt[:, 1:] == docs_bt[:, :-1], (1, 0))
    return earlier_bth * same_bt[..., None, None]


def summed(turn_btha: Tensor, start_bha: Tensor | None, docs_bt: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of turns over each document so far, and the last one within a full turn: a scan without decay."""
    b, t, h, _ = turn_btha.shape
    # One tensor for each argument: torch.compile does not trace a function that is given one twice.
    ones_bth, B_bt11, C_bt11 = (turn_btha.new_ones(shape) for shape in ((b, t, h), (b, t, 1, 1), (b, t, 1, 1)))
    A_h, D_h = turn_btha.new_zeros(h), turn_btha.new_zeros(h)
    initial = None if start_bha is None else start_bha[..., None]
    angle, last = ssd_scan(turn_btha, ones_bth, A_h, B_bt11, C_bt11, D_h, initial, docs_bt)
    return angle, within_a_turn(last[..., 0])


def within_a_turn(angle: Tensor) -> Tensor:
    return angle - 2 * math.pi * torch.floor(angle / (2 * math.pi))


def turned(x_n: Tensor, angle_a: Tensor) -> Tensor:
    """x with its first pairs of neighbours turned by the angles."""
    turning, still, _ = parts(x_n, (2 * angle_a.shape[-1], x_n.shape[-1] - 2 * angle_a.shape[-1], 0))
    pairs = turning.unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = torch.cos(angle_a), torch.sin(angle_a)
    turned_pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return torch.cat([turned_pairs.flatten(-2), still], -1)


def outer(v_bhp: Tensor, k_bhn: Tensor) -> Tensor:
    return v_bhp[..., None] * k_bhn[..., None, :]
