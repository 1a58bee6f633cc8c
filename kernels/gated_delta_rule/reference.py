"""The gated delta rule's inputs, outputs and meaning: the recurrence, one position at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.operator import Path


class DeltaInputs(NamedTuple):
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T;  y_t = S_t q_t (arXiv:2412.06464, equation 10).

    Args:
        q_bthn, k_bthn: queries and keys, of length 1.  v_bthp: values.
        log_decay_bth: log a, finite and <= 0.  beta_bth: b in [0, 1], the share of the old value that is replaced.
        initial_bhpn: state before the first position; zeros if None. It belongs to the first position's document.
        doc_ids_bt: document of each position: the state starts from zero with each. None: one document.
    Returns: y_bthp in the dtype of v; the final state_bhpn in float32 (float64 for float64 inputs).
    """

    q_bthn: Tensor
    k_bthn: Tensor
    v_bthp: Tensor
    log_decay_bth: Tensor
    beta_bth: Tensor
    initial_bhpn: Tensor | None = None
    doc_ids_bt: Tensor | None = None


class DeltaOutputs(NamedTuple):
    y_bthp: Tensor
    state_bhpn: Tensor


class StepInputs(NamedTuple):
    """The next output of each row, for decoding. No gradient passes.

    Args: as in DeltaInputs, without time.  state_bhpn: float32 or float64; updated in place.
    Returns: y_bhp in the dtype of v.
    """

    q_bhn: Tensor
    k_bhn: Tensor
    v_bhp: Tensor
    log_decay_bh: Tensor
    beta_bh: Tensor
    state_bhpn: Tensor


def recurrence(
    q_bthn: Tensor,
    k_bthn: Tensor,
    v_bthp: Tensor,
    log_decay_bthn: Tensor,
    beta_bth: Tensor,
    initial_bhpn: Tensor | None,
    doc_ids_bt: Tensor | None,
) -> DeltaOutputs:
    """The rule, position by position. Args: as in DeltaInputs.  log_decay_bthn: of each channel of the keys, or one."""
    b, t, h, p = v_bthp.shape
    dtype = torch.promote_types(v_bthp.dtype, torch.float32)
    q, k, v, log_decay, beta = (m.to(dtype) for m in (q_bthn, k_bthn, v_bthp, log_decay_bthn, beta_bth))
    identity_nn = torch.eye(q.shape[-1], dtype=dtype, device=q.device)
    state = v.new_zeros(b, h, p, q.shape[-1]) if initial_bhpn is None else initial_bhpn.to(dtype)
    outputs = []
    for i in range(t):
        if doc_ids_bt is not None and i > 0:
            state = state * (doc_ids_bt[:, i] == doc_ids_bt[:, i - 1]).to(dtype)[:, None, None, None]
        beta_bh11 = beta[:, i, :, None, None]
        faded_bhpn = state * torch.exp(log_decay[:, i, :, None, :])
        erase_bhnn = identity_nn - beta_bh11 * k[:, i, :, :, None] * k[:, i, :, None, :]
        state = faded_bhpn @ erase_bhnn + beta_bh11 * v[:, i, :, :, None] * k[:, i, :, None, :]
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, q[:, i]))
    return DeltaOutputs(torch.stack(outputs, 1).to(v_bthp.dtype), state)


def _run(inputs: DeltaInputs) -> DeltaOutputs:
    return recurrence(*inputs[:3], inputs.log_decay_bth[..., None], *inputs[4:])


gated_delta_rule = Path(_run)


def example() -> DeltaInputs:
    """A small call with an initial state and documents."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q_bthn, k_bthn = (F.normalize(normal(2, 70, 2, 4), dim=-1) for _ in range(2))
    log_decay_bth, beta_bth = -F.softplus(normal(2, 70, 2) - 2), torch.sigmoid(normal(2, 70, 2))
    doc_ids_bt = torch.tensor([[0] * 70, [0] * 66 + [1] * 4])
    return DeltaInputs(q_bthn, k_bthn, normal(2, 70, 2, 3), log_decay_bth, beta_bth, normal(2, 2, 3, 4), doc_ids_bt)


def example_step() -> StepInputs:
    """One step of two rows."""
    q_bthn, k_bthn, v_bthp, log_decay_bth, beta_bth, initial_bhpn, _ = example()
    assert initial_bhpn is not None
    return StepInputs(q_bthn[:, 0], k_bthn[:, 0], v_bthp[:, 0], log_decay_bth[:, 0], beta_bth[:, 0], initial_bhpn)
