"""The gated delta rule of Gated DeltaNet: a memory that corrects what it holds. Derivation: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.gated_delta_rule.reference import gated_delta_rule_reference
from kernels.gated_delta_rule.torch_path import gated_delta_rule_torch, gated_delta_step_torch

__all__ = ["gated_delta_rule", "gated_delta_rule_reference", "gated_delta_step"]


def gated_delta_rule(
    q_bthn: Tensor,
    k_bthn: Tensor,
    v_bthp: Tensor,
    log_decay_bth: Tensor,
    beta_bth: Tensor,
    initial_bhpn: Tensor | None = None,
    doc_ids_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T;  y_t = S_t q_t (arXiv:2412.06464, equation 10).

    Args:
        q_bthn, k_bthn: queries and keys, of length 1.  v_bthp: values.
        log_decay_bth: log a, finite and <= 0.  beta_bth: b, the share of the old value that is replaced, in [0, 1].
        initial_bhpn: state before the first position; None: zeros. It belongs to the first position's document.
        doc_ids_bt: document of each position: the state starts from zero with each. None: one document.
    Returns: y_bthp in the dtype of v; the final state_bhpn in float32 (float64 for float64 inputs).
    """
    path = gated_delta_rule_reference if dispatch.chosen(v_bthp) == "reference" else gated_delta_rule_torch
    with torch.autocast(v_bthp.device.type, enabled=False):
        return path(q_bthn, k_bthn, v_bthp, log_decay_bth, beta_bth, initial_bhpn, doc_ids_bt)


def gated_delta_step(
    q_bhn: Tensor, k_bhn: Tensor, v_bhp: Tensor, log_decay_bh: Tensor, beta_bh: Tensor, state_bhpn: Tensor
) -> Tensor:
    """The next token, for decoding: state_bhpn is updated in place. No gradient passes.

    Args: as in gated_delta_rule, without time.  state_bhpn: float32 or float64.
    Returns: y_bhp in the dtype of v.
    """
    return gated_delta_step_torch(q_bhn, k_bhn, v_bhp, log_decay_bh, beta_bh, state_bhpn)
