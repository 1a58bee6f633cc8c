"""Plain-torch causal convolution: one multiply-add over the whole sequence per tap, backward by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.causal_conv1d.reference import ConvInputs, ConvOutputs, StepInputs, tail
from kernels.operator import Path

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


class _CausalConv1d(torch.autograd.Function):
    """SiLU(sum over lags of weight * x shifted by lag), never across a document boundary."""

    @staticmethod
    def forward(
        ctx: Any, x_btd: Tensor, weight_dk: Tensor, initial_btd: Tensor | None, doc_ids_bt: Tensor | None
    ) -> Tensor:
        weight_kd = weight_dk.to(x_btd.dtype).t().contiguous()
        width, t = weight_kd.shape[0], x_btd.shape[1]
        pre_btd = x_btd * weight_kd[-1]
        for lag in range(1, width):
            if lag < t:
                pre_btd[:, lag:].addcmul_(shifted(x_btd, lag, doc_ids_bt), weight_kd[width - 1 - lag])
            if initial_btd is not None:
                pre_btd[:, :lag].addcmul_(before(initial_btd, lag, x_btd), weight_kd[width - 1 - lag])
        ctx.save_for_backward(x_btd, weight_kd, initial_btd, doc_ids_bt, pre_btd)
        return torch.nn.functional.silu(pre_btd)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_btd, weight_kd, initial_btd, doc_ids_bt, pre_btd = ctx.saved_tensors
        width, t = weight_kd.shape[0], x_btd.shape[1]
        grad_pre = torch.ops.aten.silu_backward(grad_outputs[0].contiguous(), pre_btd)
        grad_x = grad_pre * weight_kd[-1]
        grad_weight_kd = torch.zeros_like(weight_kd)
        grad_weight_kd[-1] = sum_rows(grad_pre * x_btd)
        for lag in range(1, min(width, t)):
            grad_late = grad_pre[:, lag:]
            if doc_ids_bt is not None:
                grad_late = grad_late * same_document(doc_ids_bt, lag, grad_late.dtype)
            grad_x[:, :-lag].addcmul_(grad_late, weight_kd[width - 1 - lag])
            grad_weight_kd[width - 1 - lag] = sum_rows(grad_late * x_btd[:, :-lag])
        if initial_btd is not None:
            for lag in range(1, width):
                grad_weight_kd[width - 1 - lag] += sum_rows(grad_pre[:, :lag] * before(initial_btd, lag, x_btd))
        return grad_x, grad_weight_kd.t(), None, None


def _run(inputs: ConvInputs) -> ConvOutputs:
    """Round to 16 bits once: a decoding step then gives the same."""
    x_btd, weight_dk, initial_btd, doc_ids_bt = inputs
    dtype = torch.promote_types(x_btd.dtype, weight_dk.dtype)
    precise = torch.promote_types(dtype, torch.float32)
    y_btd = _CausalConv1d.apply(x_btd.to(precise), weight_dk.to(precise), initial_btd, doc_ids_bt)
    return ConvOutputs(y_btd.to(dtype), tail(inputs))


def _run_step(inputs: StepInputs) -> Tensor:
    x_bd, weight_dk, state_bkd = inputs
    taps_bkd = torch.cat([state_bkd.to(x_bd.dtype), x_bd[:, None]], 1)
    state_bkd.copy_(taps_bkd[:, 1:])
    dtype = torch.promote_types(x_bd.dtype, weight_dk.dtype)
    precise = torch.promote_types(dtype, torch.float32)
    return torch.nn.functional.silu((taps_bkd.to(precise) * weight_dk.t()).sum(1)).to(dtype)


causal_conv1d = Path(_run, tolerance=TOLERANCE)
causal_conv1d_step = Path(_run_step, tolerance=TOLERANCE)


def shifted(x_btd: Tensor, lag: int, doc_ids_bt: Tensor | None) -> Tensor:
    """x of `lag` positions earlier, zero if that is another document."""
    earlier = x_btd[:, :-lag]
    return earlier if doc_ids_bt is None else earlier * same_document(doc_ids_bt, lag, x_btd.dtype)


def before(initial_btd: Tensor, lag: int, x_btd: Tensor) -> Tensor:
    """The inputs that the first `lag` positions of x meet at that lag."""
    first = initial_btd.shape[1] - lag
    return initial_btd[:, first : first + min(lag, x_btd.shape[1])].to(x_btd.dtype)


def same_document(doc_ids_bt: Tensor, lag: int, dtype: torch.dtype) -> Tensor:
    return (doc_ids_bt[:, lag:] == doc_ids_bt[:, :-lag]).to(dtype)[..., None]


def sum_rows(x_btd: Tensor) -> Tensor:
    return x_btd.sum((0, 1))
