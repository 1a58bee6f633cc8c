"""Inputs and runs of the causal convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from tests.kernels.helpers import documents, normal, run

PASTS = ["none", "documents", "initial"]


def past(kind: str, t: int, d: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, ...]:
    """initial_btd and doc_ids_bt, of which at most one is given."""
    initial = normal(2, width - 1, d, dtype=dtype, seed=2) if kind == "initial" and width > 1 else None
    return initial, documents(2, t, 0.2) if kind == "documents" else None


def run_conv(
    path: str,
    x: Tensor,
    weight: Tensor,
    initial: Tensor | None = None,
    docs: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """Output "out0", tail "out1" and the gradients "dx" and "dweight"; dtype: of the inputs, if not their own."""
    initial = initial if initial is None or dtype is None else initial.to(dtype)
    return run(path, lambda x, weight: causal_conv1d(x, weight, initial, docs), {"x": x, "weight": weight}, dtype)
