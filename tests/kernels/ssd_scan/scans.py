"""Inputs and runs of the SSD scan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.ssd_scan import ssd_scan
from tests.kernels.helpers import normal, run

INPUTS = ("x", "dt", "A", "B", "C", "D", "initial")


class ScanSize(NamedTuple):
    t: int
    h: int
    g: int
    p: int
    n: int


def scan_inputs(
    size: ScanSize,
    *,
    b: int = 2,
    with_initial: bool = True,
    dtype: torch.dtype = torch.float32,
    precise: torch.dtype | None = None,
) -> list[Tensor | None]:
    """precise: dtype of dt, A, D and the initial state, if not `dtype`."""
    (t, h, g, p, n), precise = size, precise or dtype
    return [
        normal(b, t, h, p, dtype=dtype),
        normal(b, t, h, dtype=precise, seed=1).exp() * 0.1,
        -normal(h, dtype=precise).exp(),
        normal(b, t, g, n, dtype=dtype, seed=2),
        normal(b, t, g, n, dtype=dtype, seed=3),
        normal(h, dtype=precise, seed=4),
        normal(b, h, p, n, dtype=precise, seed=5) if with_initial else None,
    ]


def raw_step(inputs: list[Tensor], at: int) -> list[Tensor]:
    """The arguments of ssd_step, without the state, for a position of a scan's inputs: dt and A as they are learned."""
    x, dt, A, B, C, D = inputs[:6]
    bias = normal(*A.shape, dtype=A.dtype, seed=7)
    return [x[:, at], dt[:, at].expm1().log() - bias, bias, (-A).log(), B[:, at], C[:, at], D]


def run_scan(
    path: str, inputs: list[Tensor | None], docs: Tensor | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    """Output "out0", final state "out1" and gradients "dx" and so on; dtype: of the inputs, if not their own."""
    return run(path, lambda *leaves: ssd_scan(*leaves, docs), dict(zip(INPUTS, inputs, strict=True)), dtype)


def documents_of_all_lengths(batch: int, t: int) -> Tensor:
    """Short ones, some of one position, and in the second half a long one."""
    starts = torch.rand(batch, t, generator=torch.Generator().manual_seed(t)) < 0.2
    starts[:, t // 2 :] &= torch.rand(batch, t - t // 2, generator=torch.Generator().manual_seed(1)) < 0.05
    return starts.cumsum(1)
