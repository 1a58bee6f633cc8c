"""Looking inside: what each B'MOJO layer found surprising, kept and read while it went over a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bmojo.mixers.base import LayerMemory
from bmojo.model import BMojoLM

MEMORIES = ("window", "fading", "eidetic")


@dataclass(frozen=True)
class KeptToken:
    """A position that a layer held verbatim, from the chunk that begins at `entered` to the one at `dropped`."""

    position: int
    entered: int
    dropped: int | None  # None: still held at the end


@dataclass(frozen=True)
class LayerInspection:
    """One bmojo or bmojo_f layer over a text of t tokens."""

    layer: int  # from 1
    mixer: str
    innovation_t: Tensor | None  # None in bmojo_f, which keeps nothing
    kept: tuple[KeptToken, ...]  # by position
    mass_t3: Tensor  # share of attention on window, fading and eidetic memory

    @property
    def kept_at_end(self) -> tuple[KeptToken, ...]:
        return tuple(token for token in self.kept if token.dropped is None)

    @property
    def mean_mass(self) -> tuple[float, float, float]:
        """Over the second half of the text, when the memories have filled."""
        window, fading, eidetic = self.mass_t3[self.mass_t3.shape[0] // 2 :].mean(0).tolist()
        return window, fading, eidetic


@torch.no_grad()
def inspect_memory(model: BMojoLM, tokens_t: Tensor) -> list[LayerInspection]:
    """Read one text and tell what its B'MOJO layers did.

    Raises: ValueError: the model has no such layers, or the text never leaves the window.
    """
    config = model.config
    if not {"bmojo", "bmojo_f"} & set(config.mixers):
        raise ValueError(
            f"the layers of this model are {config.pattern}: without bmojo or bmojo_f layers there is no fading or "
            "eidetic memory to look at, only what attention and SSM layers have. Inspect a model with such layers."
        )
    if tokens_t.shape[0] <= config.window_size:
        raise ValueError(
            f"the text is {tokens_t.shape[0]} tokens long and window_size is {config.window_size}: all of it is still "
            f"in the window, so nothing can be kept. Give a text of several times {config.window_size} tokens."
        )
    output = model(tokens_t[None], return_memory=True)
    assert output.memory is not None
    return [
        _inspection(index + 1, mixer, memory, config.chunk_size)
        for index, (mixer, memory) in enumerate(zip(config.mixers, output.memory, strict=True))
        if memory is not None
    ]


def _inspection(layer: int, mixer: str, memory: LayerMemory, chunk_size: int) -> LayerInspection:
    innovation_t = None if memory.innovation_bt is None else memory.innovation_bt[0].float().cpu()
    kept: tuple[KeptToken, ...] = ()
    if memory.kept_position_bjm is not None:
        kept = kept_tokens(memory.kept_position_bjm[0], chunk_size)
    return LayerInspection(layer, mixer, innovation_t, kept, memory.mass_bt3[0].float().cpu())


def kept_tokens(position_jm: Tensor, chunk_size: int) -> tuple[KeptToken, ...]:
    """When each position entered and left the sets of successive chunks (-1: empty slot); none returns once dropped."""
    entered: dict[int, int] = {}
    dropped: dict[int, int] = {}
    held: set[int] = set()
    for chunk, row in enumerate(position_jm.tolist()):
        now = {position for position in row if position >= 0}
        entered |= dict.fromkeys(now - held, chunk * chunk_size)
        dropped |= dict.fromkeys(held - now, chunk * chunk_size)
        held = now
    return tuple(KeptToken(position, entered[position], dropped.get(position)) for position in sorted(entered))
