"""The loss in plain torch, without materialising the logits of a whole batch: memory is one chunk of logits.

Its products and the softmax are operators themselves, with faster paths on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy.reference import IGNORED, LossInputs, LossOutputs
from kernels.linear import product
from kernels.operator import Path
from kernels.pointwise import cross_entropy_
from kernels.shapes_only import counts_as_gpu

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
CHUNK_LOGITS = 1 << 22  # logits held at a time, 16 MiB in float32: fewer make thin products, more gain nothing
GPU_CHUNK_LOGITS = 1 << 28  # 512 MiB in bfloat16: a GPU needs products this large
MIN_ROWS = 64  # unless the vocabulary is so large that products would become thin


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden_sd, weight_vd, target_s, z_loss_weight, logits_dtype = inputs
        weight_vd, ctx.weight_dtype = weight_vd.to(hidden_sd.dtype), weight_vd.dtype
        num_tokens, vocab_size = hidden_sd.shape[0], weight_vd.shape[0]
        precise = torch.promote_types(hidden_sd.dtype, torch.float32)
        counted_s = (target_s != IGNORED).to(precise)
        num_targets = counted_s.sum()
        share_s = counted_s / num_targets.clamp_min(1)
        nll_s = torch.empty(num_tokens, dtype=precise, device=hidden_sd.device)
        loss = nll_s.new_zeros(())
        with_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden_sd = torch.empty_like(hidden_sd) if with_grad else None
        empty_like = torch.empty_like if num_tokens else torch.zeros_like
        grad_weight_vd = empty_like(weight_vd, dtype=precise) if with_grad else None
        rows = max(MIN_ROWS, (GPU_CHUNK_LOGITS if counts_as_gpu(hidden_sd) else CHUNK_LOGITS) // vocab_size)
        for first in range(0, num_tokens, rows):
            part = slice(first, min(first + rows, num_tokens))
            logits_sv = product(hidden_sd[part], weight_vd).to(logits_dtype)
            class_s = target_s[part].clamp_min(0)
            nll_s[part], log_z_s = cross_entropy_(logits_sv, class_s, z_loss_weight, with_gradient=with_grad)
            nll_s[part] *= counted_s[part]
            loss += (nll_s[part] + z_loss_weight * log_z_s.square()) @ share_s[part]
            if grad_hidden_sd is not None and grad_weight_vd is not None:
                grad_logits_sv = logits_sv.to(hidden_sd.dtype)
                slope_s = (1 + 2 * z_loss_weight * log_z_s) * share_s[part]
                scale_s1 = slope_s[:, None].to(hidden_sd.dtype)  # applied on the thin side of both products
                torch.mul(product(grad_logits_sv, weight_vd.t()), scale_s1, out=grad_hidden_sd[part])
                _add_weight_gradient(grad_weight_vd, grad_logits_sv, hidden_sd[part] * scale_s1, add=first > 0)
                del grad_logits_sv
            del logits_sv  # before the next chunk's are there
        ctx.save_for_backward(grad_hidden_sd, grad_weight_vd)
        ctx.mark_non_differentiable(nll_s, num_targets)
        return loss, nll_s, num_targets

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_sd, grad_weight_vd = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            (grad_hidden_sd * scale).to(grad_hidden_sd.dtype),
            (grad_weight_vd * scale).to(ctx.weight_dtype),
            *[None] * 3,
        )


def _add_weight_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor, add: bool) -> None:
    """Add grad_logits^T hidden to a total of the same or a higher precision; if not `add`, overwrite it unread."""
    if total.dtype == hidden.dtype:
        total.addmm_(grad_logits.t(), hidden, beta=int(add))  # with beta 0 the total may hold anything
    elif total.is_cuda and not torch.compiler.is_compiling():  # which has no such variant
        torch.addmm(total, grad_logits.t(), hidden, beta=int(add), out_dtype=total.dtype, out=total)
    elif add:
        total += grad_logits.t() @ hidden
    else:
        total.copy_(grad_logits.t() @ hidden)


def loss_of(inputs: LossInputs, logits_dtype: torch.dtype) -> LossOutputs:
    """The loss, from logits in this dtype."""
    loss, nll_s, num_targets = _LinearCrossEntropy.apply(*inputs, logits_dtype)
    return LossOutputs(loss, nll_s.float(), num_targets)


def _run(inputs: LossInputs) -> LossOutputs:
    return loss_of(inputs, torch.promote_types(inputs.hidden_sd.dtype, torch.float32))


linear_cross_entropy = Path(_run, tolerance=TOLERANCE)
