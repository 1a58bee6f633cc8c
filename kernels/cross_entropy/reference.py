"""Inputs, outputs and formula of the loss of a projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.operator import Path, random_tensors

IGNORED = -100  # as in torch


class LossInputs(NamedTuple):
    """Mean of -log softmax(hidden weight^T)[target] + z_loss_weight * logsumexp^2 over targets other than IGNORED.

    If gradients are wanted they are computed at once, while the logits are at hand, and only scaled in the backward.

    Args: hidden_sd: of s tokens.  weight_vd: a row per class.  target_s: a class, or IGNORED.
    """

    hidden_sd: Tensor
    weight_vd: Tensor
    target_s: Tensor
    z_loss_weight: float


class LossOutputs(NamedTuple):
    loss: Tensor  # mean over targets, z-loss included
    nll_s: Tensor  # float32, of each token; 0 if ignored; without gradient
    num_targets: Tensor


def _run(inputs: LossInputs) -> LossOutputs:
    hidden_sd, weight_vd, target_s, z_loss_weight = inputs
    logits_sv = F.linear(hidden_sd, weight_vd.to(hidden_sd.dtype))
    logits_sv = logits_sv.to(torch.promote_types(logits_sv.dtype, torch.float32))
    counted_s = target_s != IGNORED
    num_targets = counted_s.sum().to(logits_sv.dtype)
    nll_s = F.cross_entropy(logits_sv, target_s, ignore_index=IGNORED, reduction="none")
    penalty_s = z_loss_weight * logits_sv.logsumexp(-1).square() * counted_s
    return LossOutputs((nll_s + penalty_s).sum() / num_targets.clamp_min(1), nll_s.detach().float(), num_targets)


linear_cross_entropy = Path(_run)


def example() -> LossInputs:
    """Targets of which some are ignored."""
    hidden_sd, weight_vd = random_tensors((13, 8), (11, 8))
    target_s = torch.arange(13) % 11
    return LossInputs(hidden_sd, weight_vd, target_s.masked_fill(target_s == 3, IGNORED), 0.1)
