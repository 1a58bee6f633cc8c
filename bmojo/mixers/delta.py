"""What mixers with a delta rule share: projections, convolution, a memory with a gate, and a gated output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.fields import ModelFields
from bmojo.layers import Linear, RMSNorm, parts
from bmojo.mixers.base import MixerCounts, MixerOutput, Sequence
from bmojo.mixers.recurrent import RecurrentMixer
from bmojo.mixers.ssm import SSMState, corrected, delta_error, held
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step

UNIT_EPS = 1e-6  # added to the squared length of queries and keys


class Gates(NamedTuple):
    """What decides how the memory fades, is written and read; all but `out` in float32 at least."""

    log_decay: Tensor  # [..., h] or [..., h, n]
    beta: Tensor  # [..., h]
    out: Tensor  # gate of the output

    def fade(self, k: Tensor) -> Tensor:
        """Keys [..., h, n], multiplied by the decay."""
        decay = torch.exp(self.log_decay)
        return k * (decay if decay.dim() == k.dim() else decay[..., None])


class DeltaMixer(RecurrentMixer):
    """u -> (low, qkv, rest); conv + SiLU on q, k, v; |q| = |k| = 1; a delta rule; a norm and a gate; out-projection.

    Its fields are Mamba-2's. A head has d_state channels for queries and keys, and ssm_head_dim for values. A subclass
    says what the other two parts of the in-projection are, what gates are made of them, and which rule it is.
    """

    FLOAT32 = ("A_log", "dt_bias")

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.in_proj = Linear(config.d_model, sum(self.in_widths(config)), config.init_std)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_channels, config.conv_width))
        self.dt_bias = nn.Parameter(torch.empty(self.num_decays(config)))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = Linear(self.d_inner, config.d_model, self.out_std(config))

    # What a subclass says

    @classmethod
    def in_widths(cls, config: ModelFields) -> tuple[int, int, int]:
        """Channels of the in-projection's parts; those of the convolution are the second."""
        raise NotImplementedError

    @classmethod
    def num_decays(cls, config: ModelFields) -> int:
        """Step sizes per position."""
        raise NotImplementedError

    @classmethod
    def rule_flops(cls, config: ModelFields) -> float:
        """Of one head and position, forward."""
        raise NotImplementedError

    def gates(self, low: Tensor, rest: Tensor) -> Gates:
        """The gates, from the first and the last part of the in-projection."""
        raise NotImplementedError

    def rule(
        self, qkv: tuple[Tensor, Tensor, Tensor], gates: Gates, initial: Tensor | None, doc_ids_bt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y_bthp, and the state after."""
        raise NotImplementedError

    def rule_step(self, qkv: tuple[Tensor, Tensor, Tensor], gates: Gates, state: Tensor) -> Tensor:
        """y_bhp; the state is updated in place."""
        raise NotImplementedError

    def gated_out(self, y: Tensor, gate: Tensor) -> Tensor:
        """The output, of y by head."""
        raise NotImplementedError

    # What follows

    @classmethod
    def num_maps(cls, config: ModelFields, num_heads: int) -> int:
        return num_heads

    @classmethod
    def counts(cls, config: ModelFields, seq_len: int) -> MixerCounts:
        """The rule counts what its chunked form needs."""
        return MixerCounts(
            params={"delta": cls.num_params(config)},
            flops={
                "delta_projections": 2.0 * cls.num_projections(config),
                "delta_rule": cls.widths(config).num_heads * cls.rule_flops(config),
            },
            state_bytes=cls.num_state_bytes(config),
        )

    @classmethod
    def num_projections(cls, config: ModelFields) -> int:
        """Weights of the projections, in and out."""
        return config.d_model * (sum(cls.in_widths(config)) + cls.widths(config).inner)

    @classmethod
    def num_params(cls, config: ModelFields) -> int:
        _, num_heads, conv_channels = cls.widths(config)
        gates = cls.num_decays(config) + num_heads
        return cls.num_projections(config) + conv_channels * config.conv_width + gates + config.ssm_head_dim

    def forward(self, u_btd: Tensor, sequence: Sequence, state: SSMState | None = None) -> MixerOutput:
        low, conv_in_btc, rest = self.in_proj.parts(u_btd, self.in_widths(self.config))
        gates = self.gates(low, rest)
        past = None if state is None else state.conv
        conv_out_btc, tail = causal_conv1d(conv_in_btc, self.conv_weight, past, sequence.doc_ids_bt)
        initial = None if state is None else state.ssm
        q_bthn, k_bthn, v_bthp = self._qkv(conv_out_btc)
        docs_bt = sequence.doc_ids_bt
        y_bthp, final = self.rule((q_bthn, k_bthn, v_bthp), gates, initial, docs_bt)
        error_bt = None
        if sequence.delta_error:

            def read(queries: Tensor) -> Tensor:
                return self.rule((queries, k_bthn, v_bthp), gates, initial, docs_bt)[0]

            error_bt = delta_error(read, gates.fade(k_bthn), v_bthp, None, gates.beta, initial, docs_bt)
        if state is not None:
            state.conv.copy_(tail)
            state.ssm.copy_(final)
        return MixerOutput(self.gated_out(y_bthp, gates.out), delta_error_bt=error_bt)

    def step_of_projected(
        self, projected: Tensor, state: SSMState, delta_error: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        low, conv_in_bc, rest = parts(projected, self.in_widths(self.config))
        gates = self.gates(low, rest)
        conv_out_bc = causal_conv1d_step(conv_in_bc, self.conv_weight, state.conv)
        q_bhn, k_bhn, v_bhp = self._qkv(conv_out_bc)
        error_b = corrected(v_bhp, held(state.ssm, gates.fade(k_bhn)), None, gates.beta) if delta_error else None
        y_bhp = self.rule_step((q_bhn, k_bhn, v_bhp), gates, state.ssm)
        return self.gated_out(y_bhp.to(projected.dtype), gates.out), error_b

    def precise(self, gate: Tensor) -> Tensor:
        """A gate in the precision of A_log at least."""
        return gate.to(torch.promote_types(gate.dtype, self.A_log.dtype))

    def _qkv(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.num_heads * self.d_state
        q, k, v = parts(conv_out, (keys, keys, self.d_inner))
        by_head = (self.num_heads, self.d_state)
        return unit(q.unflatten(-1, by_head)), unit(k.unflatten(-1, by_head)), v.unflatten(-1, (self.num_heads, -1))


def log_decay(A_log: Tensor, step_size: Tensor) -> Tensor:
    """-exp(A_log) * softplus(step_size): how much of a memory one position keeps."""
    return -torch.exp(A_log) * F.softplus(step_size)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
