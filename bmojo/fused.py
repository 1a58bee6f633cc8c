"""RMSNorm, SwiGLU and the loss by liger-kernel (optional), where the operators' Triton path is chosen: on a GPU.

Not inside torch.compile: Inductor fuses the plain versions itself, and liger's loss asks the GPU for a number, which
would break the graph.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch

logger = logging.getLogger(__name__)
IGNORED = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(x: Tensor) -> bool:
    """Whether what is computed from x is liger's to compute. Not in Triton's interpreter, which lacks what it uses."""
    if torch.compiler.is_compiling() or not _is_on_gpu(x) or x.dtype not in DTYPES:
        return False
    return dispatch.chosen(x) == "triton" and _is_installed()


def serves_loss(hidden_sd: Tensor) -> bool:
    """As serves, but in float16 the weight's gradient before the division by the targets' number may overflow."""
    return hidden_sd.dtype != torch.float16 and serves(hidden_sd)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Everything between reading x and writing the result is float32 ("gemma", offset 0)."""
    offset, in_place = 0.0, False  # in place: over the gradient, which is not ours to overwrite
    return _liger("rms_norm").LigerRMSNormFunction.apply(x, weight, eps, offset, "gemma", in_place)


def gated_product(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up for gate and up side by side."""
    product: Tensor = _liger("swiglu").LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, -2))
    return product.unflatten(0, gate_up.shape[:-1])


class LinearCrossEntropy(torch.autograd.Function):
    """See bmojo.loss: mean loss with z-loss, each target's own loss, number of targets.

    liger's own autograd function returns the mean or, at the price of the logits twice, each loss. The function under
    it returns each loss and the gradient of their sum in one pass; their mean is a matter of scale.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_sd: Tensor, weight_vd: Tensor, target_s: Tensor, z_loss_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss_s, z_loss_s, _, _, grad_hidden_sd, grad_weight_vd, _ = _liger(
            "fused_linear_cross_entropy"
        ).fused_linear_cross_entropy_forward(
            hidden_sd.contiguous(), weight_vd.contiguous(), target_s, ignore_index=IGNORED,
            lse_square_scale=z_loss_weight, reduction="none", return_z_loss=z_loss_weight != 0,
            accum_dtype=torch.float32, compute_gradients=wants_hidden or wants_weight,
            weight_requires_grad=wants_weight,
        )  # fmt: skip
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


@functools.cache
def _is_installed() -> bool:
    found = importlib.util.find_spec("liger_kernel") is not None
    if not found:
        logger.warning(
            "liger-kernel is not installed: RMSNorm, SwiGLU and the loss run as plain torch, which is slower on a GPU. "
            "To install it: pip install -e '.[gpu]'"
        )
    return found


def _liger(operator: str) -> Any:
    return importlib.import_module(f"liger_kernel.ops.{operator}")


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda
