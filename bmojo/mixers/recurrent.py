"""What Mamba-2 and the delta rules share: heads with a state [p, n] each, behind a short convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bmojo.fields import ModelFields
from bmojo.layers import Linear, RotaryTable
from bmojo.mixers.base import Mixer
from bmojo.mixers.ssm import SSMState, init_dt_bias


class Widths(NamedTuple):
    """Sizes of a layer that follow from the config."""

    inner: int  # values of all heads
    num_heads: int
    conv_channels: int  # the values, and what is read and written by


class RecurrentMixer(Mixer[SSMState]):
    """A subclass makes the parameters, and says what the convolution's channels are and how a step is taken."""

    in_proj: Linear
    conv_weight: nn.Parameter
    dt_bias: nn.Parameter
    A_log: nn.Parameter

    def __init__(self, config: ModelFields) -> None:
        super().__init__(config)
        self.head_dim, self.d_state = config.ssm_head_dim, config.d_state
        self.d_inner, self.num_heads, self.conv_channels = self.widths(config)

    # What a subclass says

    @classmethod
    def num_maps(cls, config: ModelFields, num_heads: int) -> int:
        """Vectors of d_state that the state is read by, of all heads; as many are written by."""
        raise NotImplementedError

    def step_of_projected(
        self, projected: Tensor, state: SSMState, delta_error: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The step of what in_proj gives; and, if asked, each row's ssm.delta_error."""
        raise NotImplementedError

    # What follows

    @staticmethod
    def expand(config: ModelFields) -> tuple[str, int]:
        """Inner width in units of d_model: the field that sets it, and its value."""
        return "ssm_expand", config.ssm_expand

    @classmethod
    def out_std(cls, config: ModelFields) -> float:
        """Standard deviation of the out-projection at initialisation."""
        return config.residual_std

    @classmethod
    def widths(cls, config: ModelFields) -> Widths:
        inner = cls.expand(config)[1] * config.d_model
        num_heads = inner // config.ssm_head_dim
        return Widths(inner, num_heads, inner + 2 * cls.num_maps(config, num_heads) * config.d_state)

    @classmethod
    def check(cls, config: ModelFields) -> None:
        inner = cls.widths(config).inner
        if inner % config.ssm_head_dim:
            raise ValueError(
                f"{cls.expand(config)[0]} * d_model = {inner} is not a multiple of "
                f"ssm_head_dim={config.ssm_head_dim}; change one."
            )

    @classmethod
    def num_state_bytes(cls, config: ModelFields) -> int:
        """Of decoding."""
        inner, _, conv_channels = cls.widths(config)
        return 4 * ((config.conv_width - 1) * conv_channels + inner * config.d_state)

    def init_weights(self, generator: torch.Generator) -> None:
        """See the table in bmojo.model."""
        config = self.config
        bound = config.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound, generator=generator)
        init_dt_bias(self.dt_bias, config, generator)
        nn.init.uniform_(self.A_log, config.a_min, config.a_max, generator=generator)
        with torch.no_grad():
            self.A_log.log_()

    def step(self, u_bd: Tensor, position_b: Tensor, rotary: RotaryTable, state: SSMState) -> Tensor:
        return self.step_of_projected(self.in_proj(u_bd), state)[0]

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> SSMState:
        width = self.config.conv_width
        precise = torch.promote_types(dtype, torch.float32)
        heads = (self.num_heads, self.head_dim, self.d_state)
        return SSMState(
            conv=torch.zeros(batch_size, width - 1, self.conv_channels, dtype=dtype, device=device),
            ssm=torch.zeros(batch_size, *heads, dtype=precise, device=device),
        )
