"""The recurrence of Mamba-1: a diagonal state for every channel. Derivation: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.selective_scan.chunked import selective_scan_chunked
from kernels.selective_scan.reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_reference"]


def selective_scan(
    x_bti: Tensor,
    dt_bti: Tensor,
    A_in: Tensor,
    B_btn: Tensor,
    C_btn: Tensor,
    D_i: Tensor,
    initial_bin: Tensor | None = None,
    doc_ids_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = C_t h_t + D x_t, by channel (arXiv:2312.00752, section 3).

    Args:
        x_bti: input, i channels.  dt_bti: step sizes, > 0, softplus already applied.  A_in: decay rates, < 0.
        B_btn, C_btn: input and output maps, shared by all channels.  D_i: skip.
        initial_bin: state before the first position; zeros where None. It belongs to the first position's document.
        doc_ids_bt: document of each position: the state starts from zero with each. None: one document.
    Returns: y_bti in the dtype of x; the final state_bin in float32 (float64 for float64 inputs).
    """
    scan = selective_scan_reference if dispatch.chosen(x_bti) == "reference" else selective_scan_chunked
    with torch.autocast(x_bti.device.type, enabled=False):
        return scan(x_bti, dt_bti, A_in, B_btn, C_btn, D_i, initial_bin, doc_ids_bt)
