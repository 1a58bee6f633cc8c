"""The fading memory's recurrence (Mamba-2, state-space duality). Derivation: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.ssd_scan.chunked import ssd_scan_chunked
from kernels.ssd_scan.reference import ssd_scan_reference

__all__ = ["ssd_scan", "ssd_scan_reference"]


def ssd_scan(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_h: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_h: Tensor,
    initial_bhpn: Tensor | None = None,
    doc_ids_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t (arXiv:2405.21060, equation 1 and section 6).

    Args:
        x_bthp: input per head.  dt_bth: step sizes, > 0, softplus already applied.  A_h: decay rate per head, < 0.
        B_btgn, C_btgn: input and output maps, shared by h / g heads each.  D_h: skip per head.
        initial_bhpn: state before the first position; zeros where None. It belongs to the first position's document.
        doc_ids_bt: document of each position: the state starts from zero with each. None: one document.
    Returns: y_bthp in the dtype of x; the final state_bhpn in float32 (float64 for float64 inputs).
    Raises: ValueError: heads are not a multiple of the groups.
    """
    if x_bthp.shape[2] % B_btgn.shape[2]:
        raise ValueError(f"{x_bthp.shape[2]} heads are not a multiple of the {B_btgn.shape[2]} groups of B and C.")
    scan = ssd_scan_reference if dispatch.chosen(x_bthp) == "reference" else ssd_scan_chunked
    with torch.autocast(x_bthp.device.type, enabled=False):
        return scan(x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, initial_bhpn, doc_ids_bt)
