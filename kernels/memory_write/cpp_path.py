"""A token's rotations and ring writes in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpp import library
from kernels.cpp.library import require_shapes, rows_contiguous
from kernels.memory_write.reference import WriteInputs
from kernels.memory_write.torch_path import TOLERANCE
from kernels.operator import Path


def _run(inputs: WriteInputs) -> Tensor:
    """Raises: ValueError: shapes that do not fit together."""
    q_bhp, k_bhp, v_bhp, position_b, near, far, rings, fading = inputs
    (b, heads, p), kv_heads = q_bhp.shape, k_bhp.shape[1]
    if rings.fading_k is None or rings.fading_v is None:
        fading = None
    written = rings if fading is not None else rings._replace(fading_k=None, fading_v=None)
    fading_k, fading_v = fading or (None, None)
    far_cos, far_sin = far or (None, None)

    def like(ring: Tensor | None) -> tuple[int, ...]:
        return b, 0 if ring is None else ring.shape[1], kv_heads, p

    of_token, of_table = (b, kv_heads, p), (b, p // 2)
    require_shapes(
        k_bhp=(k_bhp, of_token),
        v_bhp=(v_bhp, of_token),
        fading_k=(fading_k, of_token),
        fading_v=(fading_v, of_token),
        position_b=(position_b, (b,)),
        near_cos=(near[0], of_table),
        near_sin=(near[1], of_table),
        far_cos=(far_cos, of_table[1:]),
        far_sin=(far_sin, of_table[1:]),
        window_k=(rings.window_k, like(rings.window_k)),
        window_v=(rings.window_v, like(rings.window_k)),
        plain_k=(rings.plain_k, like(rings.window_k)),
        fading_ring_k=(rings.fading_k, like(rings.fading_k)),
        fading_ring_v=(rings.fading_v, like(rings.fading_k)),
    )
    rotated_q = q_bhp.new_empty(1 if far is None else 2, b, heads, p)
    read = [None if x is None else rows_contiguous(x) for x in (*near, far_cos, far_sin)]
    library.call(
        "memory_write", q_bhp.dtype, *map(rows_contiguous, (q_bhp, k_bhp, v_bhp)), position_b.to(torch.int64), *read,
        *written, *(None if x is None else rows_contiguous(x) for x in (fading_k, fading_v)), rotated_q,
    )  # fmt: skip
    return rotated_q


def _refuses(inputs: WriteInputs) -> str | None:
    q_bhp, rings = inputs.q_bhp, [ring for ring in inputs.rings if ring is not None]
    read = [inputs.k_bhp, inputs.v_bhp, *inputs.near, *(inputs.far or ()), *(inputs.fading or ())]
    dtypes = {x.dtype for x in (q_bhp, *read, *rings)}
    if len(dtypes) > 1:
        return "tensors of " + " and ".join(sorted(map(str, dtypes)))
    return None if all(ring.stride(-1) == 1 for ring in rings) else "rings whose rows are not contiguous"


memory_write = Path(_run, _refuses, TOLERANCE)
