"""What the Triton kernels of memory attention take, and how inputs are brought into it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.tuning import require

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256  # the shortest side of a tensor core's product; what registers hold
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Sets = list[Tensor | None]


def padded_sets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fading: tuple[Tensor, Tensor] | None,
    eidetic: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> Sets:
    """Queries, keys and values of window, fading (keys and values only) and eidetic set; None where absent.

    A head_dim that is not a power of two, or is below 16, is filled up with zeros, which copies every tensor.
    """
    sets = [q, k, v, *(fading or (None, None)), *(eidetic or (None, None, None))[:3]]
    head_dim = q.shape[-1]
    require(
        head_dim <= MAX_HEAD_DIM,
        f"memory_attention in Triton takes head_dim up to {MAX_HEAD_DIM}, not {head_dim}: "
        "use more heads, or set BMOJO_KERNELS=torch.",
    )
    padding = max(MIN_HEAD_DIM, 1 << (head_dim - 1).bit_length()) - head_dim
    return [F.pad(x, (0, padding)) if x is not None and padding else x for x in sets]


def require_group(q: Tensor, k: Tensor, limit: int) -> None:
    """limit: rows of the tile that holds the query heads of a key/value head."""
    group = q.shape[-2] // k.shape[-2]
    require(
        group <= limit,
        f"memory_attention in Triton takes up to {limit} query heads a key/value head, not {group}: "
        "use more key/value heads, or set BMOJO_KERNELS=torch.",
    )


def require_dtypes(sets: Sets, same: bool) -> None:
    """same: all inputs of one dtype."""
    dtypes = {x.dtype for x in sets if x is not None}
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    require(
        dtypes <= set(DTYPES) and (len(dtypes) == 1 or not same),
        f"memory_attention in Triton takes bfloat16, float16 or float32{', one for all inputs' if same else ''}, not "
        f"{names}: convert them, or set BMOJO_KERNELS=torch.",
    )


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied unless the channels of each head lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
