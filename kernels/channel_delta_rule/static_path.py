"""The delta rule with a decay per channel as in torch_path.py, from products of whole chunks: no blocks are cut out.

Of each size of block a product of all positions is formed, of which a mask keeps the corners between two blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.channel_delta_rule.reference import DeltaInputs
from kernels.channel_delta_rule.torch_path import TOLERANCE, Products
from kernels.gated_delta_rule.reference import DeltaOutputs
from kernels.gated_delta_rule.static_path import Chunks, by_chunk, doublings, memory_of, same_document
from kernels.operator import Path
from kernels.static import identity, lower_triangle


def _run(inputs: DeltaInputs) -> DeltaOutputs:
    dtype = torch.promote_types(inputs.v_bthp.dtype, torch.float32)
    q, k, v, log_decay, beta = (by_chunk(m.to(dtype)) for m in inputs[:5])
    made = _within_documents(_products(q, k, log_decay), inputs.doc_ids_bt)
    y_bthp, state = memory_of(Chunks(q, k, v, beta, *made), inputs.initial_bhpn, inputs.v_bthp.shape[1])
    return DeltaOutputs(y_bthp.to(inputs.v_bthp.dtype), state)


def _products(q: Tensor, k: Tensor, log_decay: Tensor) -> Products:
    """As `products` of torch_path.py. Sums of exponents over a block are products with its part of a triangle."""
    up_to, after = lower_triangle(q.shape[-2], q), lower_triangle(q.shape[-2], q, -1).t()
    rows = torch.stack([q, k])
    found = (rows * k).sum(-1)[..., None] * identity(q.shape[-2], q)
    for block, corner in doublings(found):
        reading = rows * torch.exp(torch.matmul(up_to * block, log_decay))
        read = k * torch.exp(torch.matmul(after * block, log_decay))
        found = found + torch.matmul(reading, read.transpose(-1, -2)) * corner
    reach, to_end = (torch.exp(torch.matmul(triangle, log_decay)) for triangle in (up_to, after))
    return Products(found[0], found[1], reach, to_end)


def _within_documents(made: Products, doc_ids_bt: Tensor | None) -> Products:
    if doc_ids_bt is None:
        return made
    same = same_document(doc_ids_bt, made.qk.dtype)
    return Products(
        made.qk * same.pair,
        made.kk * same.pair,
        made.reach * same.begun[..., None],
        made.to_end * same.ended[..., None],
    )


channel_delta_rule = Path(_run, tolerance=TOLERANCE)
