"""The fading memory's recurrence (Mamba-2, state-space duality). Derivation: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.ssd_scan.chunked import ssd_scan_chunked
from kernels.ssd_scan.cpp_op import serves_step, ssd_scan_cpp, ssd_step_cpp
from kernels.ssd_scan.reference import ssd_scan_reference
from kernels.ssd_scan.step import ssd_step_torch

__all__ = ["ssd_scan", "ssd_scan_reference", "ssd_step"]


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
    Raises: ValueError: heads are not a multiple of the groups, or beyond a limit of the Triton path; on the C++ path,
        shapes that do not go together.
    """
    _check_groups(x_bthp, B_btgn)
    inputs = (x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, initial_bhpn, doc_ids_bt)
    path = dispatch.chosen(x_bthp)
    with torch.autocast(x_bthp.device.type, enabled=False):
        if path == "reference":
            return ssd_scan_reference(*inputs)
        if path == "triton":
            from kernels.ssd_scan.triton_op import ssd_scan_triton

            return ssd_scan_triton(*inputs)
        if path == "cpp":
            return ssd_scan_cpp(*inputs)
        return ssd_scan_chunked(*inputs)


def ssd_step(
    x_bhp: Tensor, dt_bh: Tensor, A_h: Tensor, B_bgn: Tensor, C_bgn: Tensor, D_h: Tensor, state_bhpn: Tensor
) -> Tensor:
    """The scan's next token, for decoding: state_bhpn is updated in place. No gradient passes.

    Args: as in ssd_scan, without time.  state_bhpn: float32 or float64.
    Returns: y_bhp in the dtype of x.
    Raises: ValueError: heads are not a multiple of the groups, or beyond a limit of the Triton path.
    """
    _check_groups(x_bhp, B_bgn)
    inputs = (x_bhp, dt_bh, A_h, B_bgn, C_bgn, D_h, state_bhpn)
    path = dispatch.chosen(x_bhp)
    if path == "triton":
        from kernels.ssd_scan.triton_op import ssd_step_triton

        return ssd_step_triton(*inputs)
    if path == "cpp" and serves_step(x_bhp, state_bhpn):
        return ssd_step_cpp(*inputs)
    return ssd_step_torch(*inputs)


def _check_groups(x: Tensor, B: Tensor) -> None:
    heads, groups = x.shape[-2], B.shape[-2]
    if heads % groups:
        raise ValueError(f"{heads} heads are not a multiple of the {groups} groups of B and C.")
