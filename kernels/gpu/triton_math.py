"""Device functions that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc=None, allow_tf32: tl.constexpr = False):
    """acc + a b in float32.

    The interpreter keeps bfloat16 as its bits and multiplies those, so there both are widened first: the product of two
    bfloat16 numbers is exact in float32, and the sum is float32 on the tensor cores too.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    precision: tl.constexpr = "tf32" if allow_tf32 else "ieee"
    return tl.dot(a, b, acc, input_precision=precision)
