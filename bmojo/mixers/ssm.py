"""What state-space mixers share: their decoding state, and how step sizes start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bmojo.fields import ModelFields
from bmojo.state import LayerState


@dataclass
class SSMState(LayerState):
    """Inputs of the convolution's other taps [b, k - 1, c], and the SSM's state in float32."""

    conv: Tensor
    ssm: Tensor


def init_dt_bias(dt_bias: nn.Parameter, config: ModelFields, generator: torch.Generator) -> None:
    """Choose the bias so that softplus(bias) is log-uniform in [dt_min, dt_max]."""
    with torch.no_grad():
        nn.init.uniform_(dt_bias, math.log(config.dt_min), math.log(config.dt_max), generator=generator)
        dt = dt_bias.exp().clamp_min(1e-4)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
