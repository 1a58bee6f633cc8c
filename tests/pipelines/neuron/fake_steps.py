"""Steps of tensors without memory on a device named neuron: a program, because the name is given once in a process.

It prints a line per step: its name, and what stopped it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bmojo.layers import SwiGLU
from pipelines.neuron.checks.fake_step import CAUGHT, fake_step
from pipelines.neuron.checks.registration import register
from tests.bmojo.model_family import small_config

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "boolean index": lambda x: x[x > 0].sum() * x,
    "cpu tensor": lambda x: x + torch.ones(x.shape[-1]),
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


def stopped_by(pattern: str) -> str:
    config = small_config(pattern=pattern, window_size=128, chunk_size=64, d_ff=8)
    try:
        return str(fake_step(config, seq_len=512, batch=2).device)
    except CAUGHT as error:
        return type(error).__name__


def main() -> None:
    register()
    print("all mixers:", stopped_by("attention,swa,mamba,mamba2,gated_deltanet,bmojo_f,bmojo"))
    for name, fault in FAULTS.items():
        with planted(fault):
            print(f"{name}:", stopped_by("swa"))


if __name__ == "__main__":
    main()
