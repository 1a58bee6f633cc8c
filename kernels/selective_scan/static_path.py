"""The selective scan in chunks side by side, as in torch_path.py, in one segment and without recomputation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.operator import Path
from kernels.selective_scan.reference import SelectiveInputs, SelectiveOutputs
from kernels.selective_scan.torch_path import CHUNK, TOLERANCE
from kernels.static import padded, same_document, unbound


def _run(inputs: SelectiveInputs) -> SelectiveOutputs:
    """Memory is what a step of every position needs: tokens x channels x states, several times."""
    dtype, t = torch.promote_types(inputs.x_bti.dtype, torch.float32), inputs.x_bti.shape[1]
    x, dt, A, B, C, D = (m.to(dtype) for m in inputs[:6])
    decay_bcqin = torch.exp(_by_chunk(dt)[..., None] * A)
    if inputs.doc_ids_bt is not None:
        decay_bcqin = decay_bcqin * _by_chunk(_keeps(inputs.doc_ids_bt, dtype))[..., None]
    write_bcqin = _by_chunk(dt * x)[..., None] * _by_chunk(B)[..., None, :]
    local: list[Tensor] = []
    product: list[Tensor] = []
    for decay, write in zip(unbound(decay_bcqin, 2), unbound(write_bcqin, 2), strict=True):
        local.append(write + decay * local[-1] if local else write)
        product.append(decay * product[-1] if product else decay)
    state = torch.zeros_like(local[0][:, 0]) if inputs.initial_bin is None else inputs.initial_bin.to(dtype)
    incoming = []
    for local_bin, product_bin in zip(unbound(local[-1], 1), unbound(product[-1], 1), strict=True):
        incoming.append(state)
        state = local_bin + product_bin * state
    states = torch.stack(local, 2) + torch.stack(product, 2) * torch.stack(incoming, 1)[:, :, None]
    y_bcqi = torch.matmul(states, _by_chunk(C)[..., None])[..., 0]
    y_bti = padded(y_bcqi.flatten(1, 2), 0, -(-t % CHUNK)) + D * x
    return SelectiveOutputs(y_bti.to(inputs.x_bti.dtype), state)


def _by_chunk(m: Tensor) -> Tensor:
    """[b, t, ...] to [b, c, q, ...]; zeros beyond t, where dt = 0 leaves the state as it is."""
    return padded(m, 0, -m.shape[1] % CHUNK).unflatten(1, (-1, CHUNK))


def _keeps(doc_ids_bt: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, t + rest, 1]: 0 where a document begins, else 1, also beyond t."""
    same = same_document(doc_ids_bt, 1, dtype)
    first = torch.ones_like(same[:, :1])
    rest = first.expand(-1, -doc_ids_bt.shape[1] % CHUNK, -1)
    return torch.cat([first, same[:, 1:], rest], 1)


selective_scan = Path(_run, tolerance=TOLERANCE)
