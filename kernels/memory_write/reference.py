"""Inputs and meaning of a decoding step's rotations and ring writes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operator import Path, random_tensors
from kernels.pointwise.reference import Table


class Rings(NamedTuple):
    """Ring buffers [b, r, h, p] of keys and values, position i in slot i mod r.

    window_k: keys rotated to their positions.  plain_k: the same keys as they are, in a ring of the same size.
    fading_k, fading_v: those of the fading memory, keys rotated, in rings of another size.
    """

    window_k: Tensor
    window_v: Tensor
    plain_k: Tensor | None = None
    fading_k: Tensor | None = None
    fading_v: Tensor | None = None


class WriteInputs(NamedTuple):
    """Rotate a token's queries and keys per row, and put its keys and values into the rings. No gradient passes.

    Args:
        q_bhp, k_bhp, v_bhp: queries, keys and values of the window, not rotated.
        position_b: position of each row's token.
        near: cosines and sines [b, p / 2] of those positions, as in `pointwise.rotate`.
        far: cosines and sines [p / 2] of the constant distance at which slots are seen; None: no slots.
        rings: updated in place, in their own dtype.
        fading: keys and values of the fading memory, not rotated, if there are rings for them.
    Returns: [1, b, h, p], queries rotated to their positions; [2, b, h, p] with those rotated by `far`.
    """

    q_bhp: Tensor
    k_bhp: Tensor
    v_bhp: Tensor
    position_b: Tensor
    near: Table
    far: Table | None
    rings: Rings
    fading: tuple[Tensor, Tensor] | None = None


def _rotate(x_bhp: Tensor, table: Table) -> Tensor:
    precise = torch.promote_types(x_bhp.dtype, torch.float32)
    low, high = x_bhp.to(precise).chunk(2, -1)
    cos, sin = (part.to(precise)[..., None, :] for part in table)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x_bhp.dtype)


def _run(inputs: WriteInputs) -> Tensor:
    """Row by row."""
    q, k, v, position_b, near, far, rings, fading = inputs
    rows = [(rings.window_k, _rotate(k, near)), (rings.window_v, v), (rings.plain_k, k)]
    if fading is not None:
        rows += [(rings.fading_k, _rotate(fading[0], near)), (rings.fading_v, fading[1])]
    for batch, position in enumerate(position_b.tolist()):
        for ring, new_bhp in rows:
            if ring is not None:
                ring[batch, position % ring.shape[1]] = new_bhp[batch].to(ring.dtype)
    return torch.stack([_rotate(q, near)] if far is None else [_rotate(q, near), _rotate(q, far)])


memory_write = Path(_run)


def example() -> WriteInputs:
    """Two rows, with all rings."""
    q, k, v, fading_k, fading_v, angle, far, window_k, window_v, plain_k, old_k, old_v = random_tensors(
        *[(2, 4, 8)] + [(2, 2, 8)] * 4 + [(2, 4), (4,)] + [(2, 5, 2, 8)] * 3 + [(2, 7, 2, 8)] * 2
    )
    near, distant = (angle.cos(), angle.sin()), (far.cos(), far.sin())
    rings = Rings(window_k, window_v, plain_k, old_k, old_v)
    return WriteInputs(q, k, v, torch.tensor([12, 3]), near, distant, rings, (fading_k, fading_v))
