"""The loss by liger-kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy.reference import IGNORED, LossInputs, LossOutputs
from kernels.gpu import liger
from kernels.operator import Path

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean loss with z-loss, each target's own loss, number of targets.

    liger's own autograd function returns the mean or, at the price of the logits twice, each loss. The function under
    it returns each loss and the gradient of their sum in one pass; their mean is a matter of scale.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden_sd, weight_vd, target_s, z_loss_weight = inputs
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        forward = liger.function("fused_linear_cross_entropy", "fused_linear_cross_entropy_forward")
        loss_s, z_loss_s, _, _, grad_hidden_sd, grad_weight_vd, _ = forward(
            hidden_sd.contiguous(),
            weight_vd.contiguous(),
            target_s,
            ignore_index=IGNORED,
            lse_square_scale=z_loss_weight,
            reduction="none",
            return_z_loss=z_loss_weight != 0,
            accum_dtype=torch.float32,
            compute_gradients=wants_hidden or wants_weight,
            weight_requires_grad=wants_weight,
        )
        num_targets = (target_s != IGNORED).sum().float()
        nll_s = loss_s if z_loss_s is None else loss_s - z_loss_s.float()
        ctx.save_for_backward(grad_hidden_sd, grad_weight_vd, num_targets)
        ctx.mark_non_differentiable(nll_s, num_targets)
        return loss_s.sum() / num_targets.clamp_min(1), nll_s, num_targets

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_sd, grad_weight_vd, num_targets = ctx.saved_tensors
        scale = grad_outputs[0] / num_targets.clamp_min(1)
        grads = [None if grad is None else (grad * scale).to(grad.dtype) for grad in (grad_hidden_sd, grad_weight_vd)]
        return *grads, None, None


def _refuses(inputs: LossInputs) -> str | None:
    if inputs.hidden_sd.dtype == torch.float16:
        return "in float16 the weight's gradient may overflow before it is divided by the number of targets"
    return liger.refuses(inputs.hidden_sd)


def _run(inputs: LossInputs) -> LossOutputs:
    hidden_sd, weight_vd, target_s, z_loss_weight = inputs
    weight_vd = weight_vd.to(hidden_sd.dtype)
    loss, nll_s, num_targets = _LinearCrossEntropy.apply(hidden_sd, weight_vd, target_s, z_loss_weight)
    return LossOutputs(loss, nll_s.float(), num_targets)


linear_cross_entropy = Path(_run, _refuses, TOLERANCE)
