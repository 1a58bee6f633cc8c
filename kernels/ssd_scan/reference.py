"""The SSD scan's inputs, outputs and meaning: the recurrence of Mamba-2, one step at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.operator import Path, random_tensors


class ScanInputs(NamedTuple):
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t (arXiv:2405.21060, equation 1 and section 6).

    Args:
        x_bthp: input per head.  dt_bth: step sizes, > 0, softplus already applied.  A_h: decay rate per head, < 0.
        B_btgn, C_btgn: input and output maps, shared by h / g heads each.  D_h: skip per head.
        initial_bhpn: state before the first position; zeros if None. It belongs to the first position's document.
        doc_ids_bt: document of each position: the state starts from zero with each. None: one document.
    Returns: y_bthp in the dtype of x; the final state_bhpn in float32 (float64 for float64 inputs).
    Raises: ValueError: heads are not a multiple of the groups; on the C++ path, shapes that do not go together.
    """

    x_bthp: Tensor
    dt_bth: Tensor
    A_h: Tensor
    B_btgn: Tensor
    C_btgn: Tensor
    D_h: Tensor
    initial_bhpn: Tensor | None = None
    doc_ids_bt: Tensor | None = None


class ScanOutputs(NamedTuple):
    y_bthp: Tensor
    state_bhpn: Tensor


class StepInputs(NamedTuple):
    """The scan's next token, for decoding: state_bhpn is updated in place. No gradient passes.

    Args: as in ssd_scan, without time, with dt = softplus(dt_bh + dt_bias_h) and A = -exp(A_log_h).
        state_bhpn: float32 or float64.
    Returns: y_bhp in the dtype of x.
    Raises: ValueError: heads are not a multiple of the groups; on the C++ path, shapes that do not go together.
    """

    x_bhp: Tensor
    dt_bh: Tensor
    dt_bias_h: Tensor
    A_log_h: Tensor
    B_bgn: Tensor
    C_bgn: Tensor
    D_h: Tensor
    state_bhpn: Tensor


def check(inputs: ScanInputs) -> None:
    """Raise ValueError if heads are not a multiple of the groups."""
    _check_groups(inputs.x_bthp.shape[2], inputs.B_btgn.shape[2])


def check_step(inputs: StepInputs) -> None:
    """As `check`."""
    _check_groups(inputs.x_bhp.shape[1], inputs.B_bgn.shape[1])


def rates(inputs: StepInputs) -> tuple[Tensor, Tensor]:
    """dt and A of a step, in float32 at least."""
    dt_bh, bias_h = inputs.dt_bh, inputs.dt_bias_h
    dt_bh = F.softplus(dt_bh.to(torch.promote_types(dt_bh.dtype, bias_h.dtype)) + bias_h)
    return dt_bh, -torch.exp(inputs.A_log_h)


def _check_groups(heads: int, groups: int) -> None:
    if heads % groups:
        raise ValueError(f"{heads} heads are not a multiple of the {groups} groups of B and C.")


def _run(inputs: ScanInputs) -> ScanOutputs:
    x_bthp, dt_bth, A_h, B_btgn, C_btgn, D_h, initial_bhpn, doc_ids_bt = inputs
    b, t, h, p = x_bthp.shape
    dtype = torch.float64 if x_bthp.dtype == torch.float64 else torch.float32
    x, dt, A, D = x_bthp.to(dtype), dt_bth.to(dtype), A_h.to(dtype), D_h.to(dtype)
    B, C = (m.to(dtype).repeat_interleave(h // m.shape[2], 2) for m in (B_btgn, C_btgn))
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial_bhpn is None else initial_bhpn.to(dtype)
    outputs = []
    for i in range(t):
        if doc_ids_bt is not None and i > 0:
            state = state * (doc_ids_bt[:, i] == doc_ids_bt[:, i - 1]).to(dtype)[:, None, None, None]
        decay_bh = torch.exp(dt[:, i] * A)
        write_bhpn = torch.einsum("bh,bhp,bhn->bhpn", dt[:, i], x[:, i], B[:, i])
        state = decay_bh[..., None, None] * state + write_bhpn
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, i]) + D[:, None] * x[:, i])
    return ScanOutputs(torch.stack(outputs, 1).to(x_bthp.dtype), state)


ssd_scan = Path(_run)


def example() -> ScanInputs:
    """A small call with documents and an initial state."""
    x, dt, A, B, C, D, initial = random_tensors(
        (2, 21, 4, 4), (2, 21, 4), (4,), (2, 21, 2, 8), (2, 21, 2, 8), (4,), (2, 4, 4, 8)
    )
    return ScanInputs(x, dt.exp() / 10, -A.exp(), B, C, D, initial, torch.tensor([[0] * 21, [0] * 5 + [1] * 16]))


def example_step() -> StepInputs:
    """One step of two rows."""
    x, dt, A, B, C, D, initial, _ = example()
    assert initial is not None
    return StepInputs(x[:, 0], dt[:, 0], D, A, B[:, 0], C[:, 0], D, initial)
