"""Plain-torch selective scan: chunks of a segment side by side; segments in turn, recomputed in the backward.

Within a segment every chunk runs the recurrence from zero at the same time, along with the product P of its decays;
then the states are carried from chunk to chunk and P times what came in is added. Decays are <= 1: nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.operator import Path
from kernels.selective_scan.reference import SelectiveInputs, SelectiveOutputs

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
CHUNK = 16
SEGMENT = 512


def _run(inputs: SelectiveInputs) -> SelectiveOutputs:
    x_bti, *_, initial_bin, doc_ids_bt = inputs
    dtype = torch.promote_types(x_bti.dtype, torch.float32)
    x, dt, A, B, C, D = (m.to(dtype) for m in inputs[:6])
    state = x.new_zeros(x.shape[0], *A.shape) if initial_bin is None else initial_bin.to(dtype)
    keep_bt = None
    if doc_ids_bt is not None:
        first_b1 = torch.ones_like(doc_ids_bt[:, :1], dtype=torch.bool)
        keep_bt = torch.cat([first_b1, doc_ids_bt[:, 1:] == doc_ids_bt[:, :-1]], 1).to(dtype)
    outputs = []
    for first in range(0, x.shape[1], SEGMENT):
        part = slice(first, first + SEGMENT)
        keep = None if keep_bt is None else keep_bt[:, part]
        arguments = (x[:, part], dt[:, part], A, B[:, part], C[:, part], state, keep)
        if torch.is_grad_enabled():
            y, state = checkpoint(_segment, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _segment(*arguments)
        outputs.append(y)
    return SelectiveOutputs((torch.cat(outputs, 1) + D * x).to(x_bti.dtype), state)


def _segment(
    x_bti: Tensor, dt_bti: Tensor, A_in: Tensor, B_btn: Tensor, C_btn: Tensor, state_bin: Tensor, keep_bt: Tensor | None
) -> tuple[Tensor, Tensor]:
    """c: chunks, q: positions in a chunk. keep: 0 where a document begins, else 1."""
    t = x_bti.shape[1]
    chunks, pad = -(-t // CHUNK), -t % CHUNK

    def by_chunk(m: Tensor) -> Tensor:
        return F.pad(m, (0, 0, 0, pad)).unflatten(1, (chunks, CHUNK))

    dt_bcqi, B_bcqn = by_chunk(dt_bti), by_chunk(B_btn)
    decay_bcqin = torch.exp(dt_bcqi[..., None] * A_in)
    if keep_bt is not None:
        decay_bcqin = decay_bcqin * F.pad(keep_bt, (0, pad), value=1.0).unflatten(1, (chunks, CHUNK))[..., None, None]
    write_bcqin = (dt_bcqi * by_chunk(x_bti))[..., None] * B_bcqn[..., None, :]
    local, product = [write_bcqin[:, :, 0]], [decay_bcqin[:, :, 0]]
    for decay, write in zip(decay_bcqin.unbind(2)[1:], write_bcqin.unbind(2)[1:], strict=True):
        local.append(torch.addcmul(write, decay, local[-1]))
        product.append(decay * product[-1])
    incoming = []
    for local_bin, product_bin in zip(local[-1].unbind(1), product[-1].unbind(1), strict=True):
        incoming.append(state_bin)
        state_bin = torch.addcmul(local_bin, product_bin, state_bin)
    states_bcqin = torch.addcmul(torch.stack(local, 2), torch.stack(product, 2), torch.stack(incoming, 1)[:, :, None])
    y_bcqi = (states_bcqin @ by_chunk(C_btn)[..., None])[..., 0]
    return y_bcqi.flatten(1, 2)[:, :t], state_bin


selective_scan = Path(_run, tolerance=TOLERANCE)
