"""The inputs, outputs and meaning of the delta rule with a decay per channel: the recurrence, position by position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gated_delta_rule import reference as gated
from kernels.gated_delta_rule.reference import DeltaOutputs
from kernels.operator import Path


class DeltaInputs(NamedTuple):
    """S_t = S_{t-1} Diag(a_t) (I - b_t k_t k_t^T) + b_t v_t k_t^T;  y_t = S_t q_t (arXiv:2510.26692, equation 1).

    Args:
        q_bthn, k_bthn: queries and keys, of length 1.  v_bthp: values.
        log_decay_bthn: log a, finite and <= 0: what each channel of the keys keeps.
        beta_bth: b in [0, 1], the share of the old value that is replaced.
        initial_bhpn: state before the first position; zeros if None. It belongs to the first position's document.
        doc_ids_bt: document of each position: the state starts from zero with each. None: one document.
    Returns: y_bthp in the dtype of v; the final state_bhpn in float32 (float64 for float64 inputs).
    """

    q_bthn: Tensor
    k_bthn: Tensor
    v_bthp: Tensor
    log_decay_bthn: Tensor
    beta_bth: Tensor
    initial_bhpn: Tensor | None = None
    doc_ids_bt: Tensor | None = None


class StepInputs(NamedTuple):
    """The next output of each row, for decoding. No gradient passes.

    Args: as in DeltaInputs, without time.  state_bhpn: float32 or float64; updated in place.
    Returns: y_bhp in the dtype of v.
    """

    q_bhn: Tensor
    k_bhn: Tensor
    v_bhp: Tensor
    log_decay_bhn: Tensor
    beta_bh: Tensor
    state_bhpn: Tensor


def _run(inputs: DeltaInputs) -> DeltaOutputs:
    return gated.recurrence(*inputs)


channel_delta_rule = Path(_run)


def example() -> DeltaInputs:
    """A small call with an initial state and documents."""
    x = gated.example()
    generator = torch.Generator().manual_seed(1)
    log_decay_bthn = -F.softplus(torch.randn(x.k_bthn.shape, generator=generator) - 2)
    return DeltaInputs(x.q_bthn, x.k_bthn, x.v_bthp, log_decay_bthn, *x[4:])


def example_step() -> StepInputs:
    """One step of two rows."""
    q_bthn, k_bthn, v_bthp, log_decay_bthn, beta_bth, initial_bhpn, _ = example()
    assert initial_bhpn is not None
    return StepInputs(q_bthn[:, 0], k_bthn[:, 0], v_bthp[:, 0], log_decay_bthn[:, 0], beta_bth[:, 0], initial_bhpn)
