"""Causal depthwise convolution with SiLU, before a state-space model. Derivation: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.causal_conv1d.cpp_op import MAX_WIDTH, causal_conv1d_cpp, causal_conv1d_step_cpp, serves_step
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.causal_conv1d.shifted import causal_conv1d_shifted, shifted_step

__all__ = ["causal_conv1d", "causal_conv1d_reference", "causal_conv1d_step"]


def causal_conv1d(
    x_btd: Tensor, weight_dk: Tensor, initial_btd: Tensor | None = None, doc_ids_bt: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = SiLU(sum_k weight_k x_{t-K+1+k}), channel by channel, over positions of the same document.

    Args:
        x_btd: input.  weight_dk: K taps a channel, the last one multiplying the current position.
        initial_btd: the K - 1 inputs before the first; zeros where None. Passes no gradient. Not with doc_ids_bt.
        doc_ids_bt: document of each position; None: one.
    Returns: y_btd in the dtype of x, and the last K - 1 inputs [b, K - 1, d] to continue from.
    Raises: ValueError: initial_btd and doc_ids_bt together; on the C++ path, shapes that do not go together.
    """
    if initial_btd is not None and doc_ids_bt is not None:
        raise ValueError("causal_conv1d continues one document: give initial_btd or doc_ids_bt, not both.")
    path = dispatch.chosen(x_btd)
    if path == "reference":
        return causal_conv1d_reference(x_btd, weight_dk, initial_btd, doc_ids_bt)
    if path == "triton":
        from kernels.causal_conv1d.triton_op import causal_conv1d_triton

        y_btd = causal_conv1d_triton(x_btd, weight_dk, initial_btd, doc_ids_bt)
    elif path == "cpp" and weight_dk.shape[1] <= MAX_WIDTH:
        y_btd = causal_conv1d_cpp(x_btd, weight_dk, initial_btd, doc_ids_bt)
    else:
        y_btd = causal_conv1d_shifted(x_btd, weight_dk, initial_btd, doc_ids_bt)
    past = weight_dk.shape[1] - 1
    tail_btd = x_btd.detach()[:, -past:]
    if tail_btd.shape[1] < past:
        zeros = x_btd.new_zeros(x_btd.shape[0], past, x_btd.shape[2])
        tail_btd = torch.cat([zeros if initial_btd is None else initial_btd.to(x_btd.dtype), tail_btd], 1)[:, -past:]
    return y_btd, tail_btd


def causal_conv1d_step(x_bd: Tensor, weight_dk: Tensor, state_bkd: Tensor) -> Tensor:
    """The next output of each row, for decoding. No gradient passes.

    Args:
        state_bkd: the last K - 1 inputs, oldest first; x_bd is added in place and the oldest goes.
    Returns: y_bd, in the wider dtype of x and weight.
    """
    path = dispatch.chosen(x_bd)
    if path == "triton":
        from kernels.causal_conv1d.triton_op import causal_conv1d_step_triton

        return causal_conv1d_step_triton(x_bd, weight_dk, state_bkd)
    if path == "cpp" and serves_step(x_bd, weight_dk, state_bkd):
        return causal_conv1d_step_cpp(x_bd, weight_dk, state_bkd)
    return shifted_step(x_bd, weight_dk, state_bkd)
