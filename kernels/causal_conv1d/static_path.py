"""The causal convolution as a sum of shifted inputs, one per tap."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels.causal_conv1d.reference import ConvInputs, ConvOutputs, tail
from kernels.operator import Path
from kernels.static import padded, same_document, shifted, unbound

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def _run(inputs: ConvInputs) -> ConvOutputs:
    x_btd, weight_dk, initial_btd, doc_ids_bt = inputs
    dtype = torch.promote_types(x_btd.dtype, weight_dk.dtype)
    precise = torch.promote_types(dtype, torch.float32)
    taps = unbound(weight_dk.to(precise), 1)
    past, given = len(taps) - 1, x_btd.to(precise)
    if initial_btd is not None:
        given = torch.cat([initial_btd.detach().to(precise), given], 1)
    total = given * taps[-1]
    for lag in range(1, past + 1):
        earlier = shifted(given, lag)
        if doc_ids_bt is not None:
            earlier = earlier * same_document(doc_ids_bt, lag, precise)
        total = total + earlier * taps[past - lag]
    y_btd = F.silu(total if initial_btd is None else padded(total, -past, 0))
    return ConvOutputs(y_btd.to(dtype), tail(inputs))


causal_conv1d = Path(_run, tolerance=TOLERANCE)
