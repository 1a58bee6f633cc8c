"""Products by torch's own linear: MKL or another BLAS on a CPU, cuBLAS on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear.reference import LinearInputs
from kernels.operator import Path

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


@torch.no_grad()
def _product(inputs: LinearInputs) -> Tensor:
    return F.linear(inputs.x, inputs.weight_oi)


linear = Path[LinearInputs, Tensor](lambda inputs: F.linear(*inputs), tolerance=TOLERANCE)
product = Path(_product, tolerance=TOLERANCE)
