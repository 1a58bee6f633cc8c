"""Memory attention in chunks of queries, all at once: each chunk beside the blocks of keys that its window reaches.

The fading key of position i - W is laid beside the window key of position i, as in torch_path.py: both sets then have
one band for a mask. Slots are read by a product with ones and zeros. Scores of all sets stand side by side under one
softmax in float32.

b batch, c chunks, n key/value heads, g query heads of one, q queries of a chunk, r (g q), s keys beside a chunk, z sets
side by side, m slots, p channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.memory_attention.reference import AttentionInputs, FlatInputs
from kernels.operator import Path
from kernels.static import MASKED, one_hot, padded, parts, shifted

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
QUERY_CHUNK = 128


@dataclass(frozen=True)
class Blocks:
    """Queries in chunks, and the blocks of keys that each reads: its own and those before it.

    chunk: queries in one: those that share slots; all of them, if the window is as long.  count: chunks.
    back: blocks before its own that a chunk reads.
    """

    inputs: FlatInputs
    chunk: int
    count: int
    back: int

    @classmethod
    def of(cls, inputs: FlatInputs) -> Blocks:
        t, w = inputs.num_queries, inputs.window_size
        chunk = min(t, inputs.chunk_size if inputs.num_slots else t if w >= t else QUERY_CHUNK)
        count, before = -(-t // chunk), -(-(inputs.k.shape[1] - t) // chunk)
        return cls(inputs, chunk, count, min(-(-(w - 1) // chunk), count - 1 + before))

    def queries(self, x_bthp: Tensor) -> Tensor:
        """[b, t, h, p] to [b, c, n, r, p]."""
        heads = (x_bthp.shape[2] // self.inputs.group, self.inputs.group)
        x_bcqngp = self._filled(x_bthp).unflatten(1, (self.count, self.chunk)).unflatten(3, heads)
        return x_bcqngp.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)

    def by_time(self, x_bcnrp: Tensor) -> Tensor:
        """The reverse."""
        x_bcqngp = x_bcnrp.unflatten(3, (self.inputs.group, self.chunk)).permute(0, 1, 4, 2, 3, 5)
        return padded(x_bcqngp.flatten(1, 2).flatten(2, 3), 0, self.inputs.num_queries - self.count * self.chunk)

    def keys(self, x_bsh: Tensor) -> Tensor:
        """[b, rows, ...], of which the last is that of the last query, to [b, c, s, ...]; zeros where there is none."""
        before = x_bsh.shape[1] - self.inputs.num_queries
        filled = padded(self._filled(x_bsh), self.back * self.chunk - before, 0)
        blocks = filled.unflatten(1, (self.back + self.count, self.chunk))
        return torch.cat([padded(blocks, -i, i - self.back) for i in range(self.back + 1)], 2)

    def band(self, first: int) -> Tensor:
        """[c, q, s]: whether a key is in a query's window, and not of a position before `first`."""
        device = self.inputs.q.device
        query = torch.arange(self.chunk, device=device) + self.back * self.chunk
        key = torch.arange((self.back + 1) * self.chunk, device=device)
        distance = query[:, None] - key
        near = (distance >= 0) & (distance < self.inputs.window_size)
        block = torch.arange(self.count, device=device) - self.back
        return near & (block[:, None] * self.chunk + key >= first)[:, None]

    def _filled(self, x: Tensor) -> Tensor:
        """With rows up to a whole number of chunks."""
        return padded(x, 0, self.count * self.chunk - self.inputs.num_queries)


def _run(given: AttentionInputs) -> Tensor:
    inputs = FlatInputs.of(given)
    blocks = Blocks.of(inputs)
    near = [(inputs.k, inputs.v, _window_mask(blocks))]
    if inputs.fading_k is not None and inputs.fading_v is not None:
        near.append((inputs.fading_k, inputs.fading_v, _fading_mask(blocks, inputs.fading_k.shape[1])))
    keys, values = (torch.cat([blocks.keys(x[i]).transpose(2, 3) for x in near], 3) for i in (0, 1))
    scores = [_scores(blocks, inputs.q, keys, torch.cat([mask for *_, mask in near], -1))]
    if inputs.index_bjm is not None and inputs.eidetic_q is not None and inputs.eidetic_k is not None:
        slots = _one_hot_slots(blocks, inputs.index_bjm, inputs.eidetic_k)
        slot_k = _slots(slots, inputs.eidetic_k)
        slot_v = _slots(slots, inputs.v if inputs.eidetic_v is None else inputs.eidetic_v)
        scores.append(_scores(blocks, inputs.eidetic_q, slot_k, _slots_mask(blocks, inputs.index_bjm)))
    probs = torch.softmax(torch.cat(scores, -1), -1).to(values.dtype)
    if len(scores) == 1:
        return blocks.by_time(torch.matmul(probs, values))
    near_probs, far_probs = parts(probs, [x.shape[-1] for x in scores])
    return blocks.by_time(torch.matmul(near_probs, values) + torch.matmul(far_probs, slot_v))


def _scores(blocks: Blocks, q_bthp: Tensor, k_bcnsp: Tensor, mask_bcqs: Tensor) -> Tensor:
    """[b, c, n, r, s], in float32 at least, and MASKED where the mask is False."""
    products = torch.matmul(blocks.queries(q_bthp), k_bcnsp.transpose(-1, -2))
    scores = products.to(torch.promote_types(products.dtype, torch.float32)) * blocks.inputs.scale
    by_query = scores.unflatten(3, (blocks.inputs.group, blocks.chunk))
    return torch.where(mask_bcqs[:, :, None, None], by_query, MASKED).flatten(3, 4)


def _window_mask(blocks: Blocks) -> Tensor:
    """[b or 1, c, q, s]."""
    inputs = blocks.inputs
    mask = blocks.band(max(-inputs.num_past, inputs.num_queries - inputs.k.shape[1]))[None]
    return mask if inputs.doc_ids_bt is None else mask & _same_document(blocks, inputs.doc_ids_bt)


def _fading_mask(blocks: Blocks, num_rows: int) -> Tensor:
    """As the window's, for keys of W positions earlier."""
    inputs, w, t = blocks.inputs, blocks.inputs.window_size, blocks.inputs.num_queries
    mask = blocks.band(max(w - inputs.num_past, t - num_rows))[None]
    if inputs.doc_ids_bt is None:
        return mask
    return mask & _same_document(blocks, shifted(inputs.doc_ids_bt, w))


def _same_document(blocks: Blocks, of_keys_bt: Tensor) -> Tensor:
    """[b, c, q, s]."""
    return _of_queries(blocks)[..., None] == blocks.keys(of_keys_bt)[:, :, None]


def _of_queries(blocks: Blocks) -> Tensor:
    """Documents, [b, c, q]."""
    docs_bt = blocks.inputs.doc_ids_bt
    assert docs_bt is not None
    filled = padded(docs_bt, 0, blocks.count * blocks.chunk - blocks.inputs.num_queries)
    return filled.unflatten(1, (blocks.count, blocks.chunk))


def _slots_mask(blocks: Blocks, index_bjm: Tensor) -> Tensor:
    """[b, c, q or 1, m]: slots that are full, for queries of the document that their chunk begins in."""
    full = (padded(index_bjm, 0, blocks.count - index_bjm.shape[1]) >= 0)[:, :, None]
    if blocks.inputs.doc_ids_bt is None:
        return full
    docs_bcq = _of_queries(blocks)
    return full & (docs_bcq == docs_bcq[:, :, :1])[..., None]


def _one_hot_slots(blocks: Blocks, index_bjm: Tensor, rows_bshp: Tensor) -> Tensor:
    """[b, (c m), s], by chunk: a product with it reads the slots."""
    index_bcm = padded(index_bjm, 0, blocks.count - index_bjm.shape[1])
    return one_hot(index_bcm, rows_bshp.shape[1], rows_bshp.dtype)


def _slots(one_hot_bcms: Tensor, rows_bshp: Tensor) -> Tensor:
    """Keys or values of the slots, [b, c, n, m, p]."""
    found = torch.matmul(one_hot_bcms.flatten(1, 2), rows_bshp.flatten(2))
    return found.unflatten(2, rows_bshp.shape[2:]).unflatten(1, one_hot_bcms.shape[1:3]).transpose(2, 3)


memory_attention = Path(_run, tolerance=TOLERANCE)
