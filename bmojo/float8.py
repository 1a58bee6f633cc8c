"""Training whose products with the blocks' projections are in float8 (docs/design/0047)."""

from __future__ import annotations

import torch

from bmojo.layers import Linear
from bmojo.mixers.base import Mixer
from bmojo.model import BMojoLM
from kernels.float8_linear import ALIGNED, device_refuses
from kernels.float8_linear.self_check import wrong_on


def float8_projections(model: BMojoLM) -> dict[str, Linear]:
    """The projections of the blocks that float8 is for, by name; not the embedding, not the head."""
    modules = dict(model.blocks.named_modules(prefix="blocks"))
    mixers = {prefix: module for prefix, module in modules.items() if isinstance(module, Mixer)}
    left_out = {f"{prefix}.{name}" for prefix, mixer in mixers.items() for name in mixer.NOT_FLOAT8}
    return {name: module for name, module in modules.items() if isinstance(module, Linear) and name not in left_out}


def train_in_float8(model: BMojoLM, device: torch.device) -> None:
    """From now on compute those products in float8 wherever a gradient is wanted. Weights stay as they are.

    Raises: ValueError: the device cannot, widths do not allow it, or a check on the device came out wrong.
    """
    refused = device_refuses(device)
    if refused is not None:
        raise ValueError(f"{refused}. Use precision: bf16.")
    mark_float8(model)
    wrong = wrong_on(device)
    if wrong is not None:
        raise ValueError(f"a check before training found that {wrong} on this GPU. Use precision: bf16, and report it.")


def mark_float8(model: BMojoLM) -> None:
    """As `train_in_float8`, whatever the device: elsewhere than on such a GPU the same rounding is emulated, slowly.

    Raises: ValueError: widths do not allow it.
    """
    projections = float8_projections(model)
    odd = {name: module.in_features for name, module in projections.items() if module.in_features % ALIGNED}
    if odd:
        name, width = next(iter(odd.items()))
        raise ValueError(
            f"float8 products need projections that read a multiple of {ALIGNED} channels, and {len(odd)} of "
            f"{len(projections)} do not: {name} reads {width}. Change the model's widths, or use precision: bf16."
        )
    for module in projections.values():
        module.trains_in_float8 = True
