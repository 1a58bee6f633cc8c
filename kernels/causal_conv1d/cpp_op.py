"""The causal convolution and its decoding step by the C++ kernels: shapes, memory, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cpp import library
from kernels.cpp.library import rows_contiguous

MAX_WIDTH = 4  # as in cpp_kernels.cpp, and so the next
PART_POSITIONS = 64  # whose shares of the weight's gradient are added up together


class CausalConv1dCpp(torch.autograd.Function):
    """SiLU(sum over lags of weight * x shifted by lag), never across a document boundary; inputs of one dtype."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        x, weight_dk, initial, doc_ids = (None if m is None else rows_contiguous(m) for m in inputs)
        assert x is not None
        y_btd = x.new_empty(x.shape)
        library.call("causal_conv1d_forward", x.dtype, x, weight_dk, initial, doc_ids, y_btd)
        ctx.save_for_backward(x, weight_dk, initial, doc_ids)
        return y_btd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_dk, initial, doc_ids = ctx.saved_tensors
        dx, dweight_dk = x.new_empty(x.shape), weight_dk.new_empty(weight_dk.shape)
        parts, (d, width) = x.shape[0] * -(-x.shape[1] // PART_POSITIONS), weight_dk.shape
        dweight_skd = x.new_empty(parts, width, d)
        library.call(
            "causal_conv1d_backward", x.dtype,
            x, weight_dk, initial, doc_ids, rows_contiguous(grad_outputs[0]), dx, dweight_skd, dweight_dk,
        )  # fmt: skip
        return dx, dweight_dk, None, None


def causal_conv1d_cpp(
    x_btd: Tensor, weight_dk: Tensor, initial_btd: Tensor | None, doc_ids_bt: Tensor | None
) -> Tensor:
    """y_btd of kernels.causal_conv1d. Raises: ValueError: a shape that does not go with that of x."""
    (b, t, d), (channels, width) = x_btd.shape, weight_dk.shape
    if channels != d:
        raise ValueError(f"x has {d} channels, but weight_dk has {channels}.")
    if initial_btd is not None and (initial_btd.shape[::2] != (b, d) or initial_btd.shape[1] < width - 1):
        raise ValueError(f"initial_btd has shape {tuple(initial_btd.shape)}, expected {(b, width - 1, d)}.")
    if doc_ids_bt is not None and doc_ids_bt.shape != (b, t):
        raise ValueError(f"doc_ids_bt has shape {tuple(doc_ids_bt.shape)}, expected {(b, t)}.")
    initial = None if initial_btd is None else initial_btd.to(x_btd.dtype)
    docs = None if doc_ids_bt is None else doc_ids_bt.to(torch.int64)
    y_btd: Tensor = CausalConv1dCpp.apply(x_btd, weight_dk.to(x_btd.dtype), initial, docs)
    return y_btd


def serves_step(x_bd: Tensor, weight_dk: Tensor, state_bkd: Tensor) -> bool:
    """Whether the step's kernel takes these; it computes in the dtype of x."""
    return x_bd.dtype == weight_dk.dtype == state_bkd.dtype and state_bkd.stride(-1) == 1


def causal_conv1d_step_cpp(x_bd: Tensor, weight_dk: Tensor, state_bkd: Tensor) -> Tensor:
    """See kernels.causal_conv1d_step. Raises: ValueError: shapes that do not go together."""
    (b, d), past = x_bd.shape, weight_dk.shape[1] - 1
    if weight_dk.shape[0] != d or state_bkd.shape != (b, past, d):
        raise ValueError(
            f"weight_dk has shape {tuple(weight_dk.shape)} and state_bkd {tuple(state_bkd.shape)}, "
            f"expected {(d, past + 1)} and {(b, past, d)}."
        )
    y_bd = torch.empty(x_bd.shape, dtype=x_bd.dtype)
    library.call("causal_conv1d_step", x_bd.dtype, rows_contiguous(x_bd), weight_dk, state_bkd, y_bd)
    return y_bd
