"""Faults to plant in a model: what must not be in a step on a NeuronCore, each of which some check must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bmojo.layers import SwiGLU

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "boolean index": lambda x: x[x > 0].sum() * x,
    "cpu tensor": lambda x: x + torch.ones(x.shape[-1]),
    "float64": lambda x: (x.double() * 2).to(x.dtype),
    "deny list": lambda x: x.cumprod(-1),
    "graph break": lambda x: (torch._dynamo.graph_break(), x)[1],
}


@contextmanager
def planted(fault: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A fault in every block's feed-forward network."""
    original = SwiGLU.forward
    SwiGLU.forward = lambda self, x: original(self, fault(x))  # type: ignore[method-assign]  # planted, and taken back below
    try:
        yield
    finally:
        SwiGLU.forward = original  # type: ignore[method-assign]  # as it was
