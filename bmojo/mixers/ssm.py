"""What state-space mixers share: their decoding state, how step sizes start, and what a token corrects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmojo.fields import ModelFields
from bmojo.state import LayerState


@dataclass
class SSMState(LayerState):
    """Inputs of the convolution's other taps [b, k - 1, c], and the SSM's state in float32."""

    conv: Tensor
    ssm: Tensor


def init_dt_bias(dt_bias: nn.Parameter, config: ModelFields, generator: torch.Generator) -> None:
    """Choose the bias so that softplus(bias) is log-uniform in [dt_min, dt_max]."""
    with torch.no_grad():
        nn.init.uniform_(dt_bias, math.log(config.dt_min), math.log(config.dt_max), generator=generator)
        dt = dt_bias.exp().clamp_min(1e-4)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


@torch.no_grad()
def delta_error(
    read: Callable[[Tensor], Tensor],
    k_bthn: Tensor,
    v_bthp: Tensor,
    decay_bth: Tensor | None,
    share_bth: Tensor,
    initial_bhpn: Tensor | None,
    doc_ids_bt: Tensor | None,
) -> Tensor:
    """The sum over heads of b_t |v_t - a_t S_{t-1} k_t|: how much a token corrects the state, HOLA's score
    (arXiv:2607.02303), [b, t] in float32 at least.

    Args:
        read: S_t q_t of queries [b, t, h, n] (or of groups of heads): the scan, whose state S it does not change.
        k_bthn: keys, of heads or of groups.  v_bthp: values.
        decay_bth: a_t; None: the keys are multiplied by it.  share_bth: b_t.
        initial_bhpn: S before the first position; None: zeros.
    """
    next_k = F.pad(k_bthn[:, 1:], (0, 0, 0, 0, 0, 1))  # so position t reads S_t k_{t+1}
    dtype = torch.promote_types(v_bthp.dtype, torch.float32)
    held_bthp = F.pad(read(next_k)[:, :-1].to(dtype), (0, 0, 0, 0, 1, 0))
    if initial_bhpn is not None:
        held_bthp[:, 0] = held(initial_bhpn, k_bthn[:, 0])
    if doc_ids_bt is not None:
        begins_bt = F.pad(doc_ids_bt[:, 1:] != doc_ids_bt[:, :-1], (1, 0))
        held_bthp = held_bthp.masked_fill(begins_bt[..., None, None], 0)
    return corrected(v_bthp.to(dtype), held_bthp, decay_bth, share_bth)


def held(state_bhpn: Tensor, k_bhn: Tensor) -> Tensor:
    """S k, what the state holds under keys of heads or of groups, [b, h, p] in the dtype of the state."""
    k_bhn = k_bhn.to(state_bhpn.dtype).repeat_interleave(state_bhpn.shape[1] // k_bhn.shape[1], 1)
    return (state_bhpn @ k_bhn[..., None])[..., 0]


def corrected(v: Tensor, held_p: Tensor, decay_h: Tensor | None, share_h: Tensor) -> Tensor:
    """The sum over heads of b |v - a S k|; leading dimensions alike. decay_h: a; None: it is in S k."""
    if decay_h is not None:
        held_p = decay_h[..., None].to(held_p.dtype) * held_p
    error_h = torch.linalg.vector_norm(v.to(held_p.dtype) - held_p, dim=-1)
    return (share_h.to(error_h.dtype) * error_h).sum(-1)
