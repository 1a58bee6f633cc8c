"""Settings that stay best when a model grows: initial values, rates and decays by width and depth (docs/design/0052).

The rules are muP's for width (arXiv:2203.03466, table 8) and CompleteP's for depth (arXiv:2505.01618, table 1, alpha =
1). With m = d_model / base_d_model and l = num_layers / base_num_layers, AdamW and projections W inside the blocks:

    initial std 1 / sqrt(m),  lr 1 / m,  decay m,  eps 1 / (m l),  logits times 1 / m,  what a layer adds times 1 / l

The two multipliers are part of the weights, so that the model stays as it is: the last norm has 1 / m in it, and the
projections that write to the residual stream have 1 / l. AdamW takes the same steps in proportion to a weight if its
rate is in that proportion too (arXiv:2203.03466, lemma J.1). Decay times rate stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from bmojo import BMojoLM, ModelConfig
from bmojo.model import projection_names
from pipelines.stages.train.optimizers.config import TransferConfig

FINAL_NORM = "norm.weight"
_WRITERS = (".mixer.out_proj.weight", ".mlp.down_proj.weight")  # of the residual stream
_SCALED_ALREADY = (".mixer.ssm.out_proj.weight", ".mixer.dt_proj.weight")  # start by their fan in, at any width


class Factors(NamedTuple):
    """Of a parameter, relative to what the settings say."""

    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def factors_of(model: BMojoLM, transfer: TransferConfig | None) -> dict[str, Factors]:
    """By parameter; all 1 for a model of the base's size, and without transfer."""
    names = [name for name, _ in model.named_parameters()]
    if transfer is None:
        return dict.fromkeys(names, Factors())
    width, depth = ratios(model.config, transfer)
    projections = set(projection_names(model))
    return {name: _factors(name, name in projections, width, depth) for name in names}


def ratios(model: ModelConfig, transfer: TransferConfig) -> tuple[float, float]:
    """How many times as wide, and as deep, as the base."""
    depth = 1.0 if transfer.base_num_layers is None else model.num_layers / transfer.base_num_layers
    return model.d_model / transfer.base_d_model, depth


def _factors(name: str, is_projection: bool, width: float, depth: float) -> Factors:
    if name in ("embedding.weight", "head.weight"):
        return Factors(eps=1 / width)
    if name == FINAL_NORM:
        return Factors(init=1 / width, lr=1 / width)
    if name.endswith(".fading_gain"):  # a vector that writes to the residual stream
        return Factors(init=1 / depth, lr=1 / depth)
    if name.endswith(_WRITERS):
        # Its std has 1 / sqrt(2 layers) in it, of which the part beyond the base's is in 1 / depth.
        return Factors(width**-0.5 * depth**-0.5, 1 / (width * depth), width * depth, 1 / width)
    if is_projection:
        init = 1.0 if name.endswith(_SCALED_ALREADY) else width**-0.5
        return Factors(init, 1 / width, width, 1 / (width * depth))
    if name.startswith("blocks."):  # norms, convolutions and SSM parameters: their fan in does not grow
        return Factors(eps=1 / depth)
    return Factors()


@torch.no_grad()
def scale_initial_values(model: BMojoLM, transfer: TransferConfig | None) -> None:
    """Bring new weights to the scale of the model's size, in place."""
    for name, factors in factors_of(model, transfer).items():
        if factors.init != 1.0:
            model.get_parameter(name).mul_(factors.init)


def scaled_parts(model: BMojoLM, parts: Iterator[nn.Module], transfer: TransferConfig | None) -> Iterator[nn.Module]:
    """The same for a model whose new values come part by part."""
    factors = factors_of(model, transfer)
    by_parameter = {parameter: factors[name] for name, parameter in model.named_parameters()}
    for part in parts:
        with torch.no_grad():
            for parameter in part.parameters():
                if by_parameter[parameter].init != 1.0:
                    parameter.mul_(by_parameter[parameter].init)
        yield part
