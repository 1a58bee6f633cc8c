"""The selective scan's inputs, outputs and meaning: the recurrence of Mamba, one step at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operator import Path, random_tensors


class SelectiveInputs(NamedTuple):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = C_t h_t + D x_t, by channel (arXiv:2312.00752, section 3).

    Args:
        x_bti: input, i channels.  dt_bti: step sizes, > 0, softplus already applied.  A_in: decay rates, < 0.
        B_btn, C_btn: input and output maps, shared by all channels.  D_i: skip.
        initial_bin: state before the first position; zeros if None. It belongs to the first position's document.
        doc_ids_bt: document of each position: the state starts from zero with each. None: one document.
    Returns: y_bti in the dtype of x; the final state_bin in float32 (float64 for float64 inputs).
    """

    x_bti: Tensor
    dt_bti: Tensor
    A_in: Tensor
    B_btn: Tensor
    C_btn: Tensor
    D_i: Tensor
    initial_bin: Tensor | None = None
    doc_ids_bt: Tensor | None = None


class SelectiveOutputs(NamedTuple):
    y_bti: Tensor
    state_bin: Tensor


def _run(inputs: SelectiveInputs) -> SelectiveOutputs:
    x_bti, *_, initial_bin, doc_ids_bt = inputs
    dtype = torch.promote_types(x_bti.dtype, torch.float32)
    x, dt, A, B, C, D = (m.to(dtype) for m in inputs[:6])
    state = x.new_zeros(x.shape[0], *A.shape) if initial_bin is None else initial_bin.to(dtype)
    outputs = []
    for i in range(x.shape[1]):
        if doc_ids_bt is not None and i > 0:
            state = state * (doc_ids_bt[:, i] == doc_ids_bt[:, i - 1]).to(dtype)[:, None, None]
        write_bin = (dt[:, i] * x[:, i])[..., None] * B[:, i, None, :]
        state = torch.exp(dt[:, i, :, None] * A) * state + write_bin
        outputs.append(torch.einsum("bin,bn->bi", state, C[:, i]) + D * x[:, i])
    return SelectiveOutputs(torch.stack(outputs, 1).to(x_bti.dtype), state)


selective_scan = Path(_run)


def example() -> SelectiveInputs:
    """A small call with documents and an initial state."""
    x, dt, A, B, C, D, initial = random_tensors((2, 19, 4), (2, 19, 4), (4, 3), (2, 19, 3), (2, 19, 3), (4,), (2, 4, 3))
    docs = torch.tensor([[0] * 19, [0] * 5 + [1] * 14])
    return SelectiveInputs(x, dt.exp() / 10, -A.exp(), B, C, D, initial, docs)
