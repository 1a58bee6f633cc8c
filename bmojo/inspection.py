"""Looking inside: what each B'MOJO layer found surprising, kept and read while it went over a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bmojo.fields import Selection
from bmojo.layers import RotaryTable
from bmojo.mixers.base import LayerMemory, Sequence
from bmojo.mixers.bmojo import BMojo
from bmojo.mixers.selection import RULES
from bmojo.model import Block, BMojoLM

MEMORIES = ("window", "fading", "eidetic")
THRESHOLD = 1.0  # of the rule `threshold`, where the model has none: outputs predicted no better than by 0


@dataclass(frozen=True)
class KeptToken:
    """A position that a layer held verbatim, from the chunk that begins at `entered` to the one at `dropped`."""

    position: int
    entered: int
    dropped: int | None  # None: still held at the end


@dataclass(frozen=True)
class RuleInspection:
    """What one selection rule would have a layer hold at the end of the text."""

    rule: str
    positions: tuple[int, ...]  # best first
    threshold: float | None = None  # of the rule `threshold`

    @property
    def label(self) -> str:
        """Its name, with the threshold."""
        return self.rule if self.threshold is None else f"{self.rule} {self.threshold:g}"

    def shared_with(self, other: RuleInspection) -> int:
        """How many of its tokens the other rule keeps too."""
        return len({*self.positions} & {*other.positions})


@dataclass(frozen=True)
class LayerInspection:
    """One bmojo or bmojo_f layer over a text of t tokens."""

    layer: int  # from 1
    mixer: str
    innovation_t: Tensor | None  # None in bmojo_f, which keeps nothing
    kept: tuple[KeptToken, ...]  # by position
    mass_t3: Tensor  # share of attention on window, fading and eidetic memory
    rules: tuple[RuleInspection, ...] = ()  # side by side, the model's own first; none in bmojo_f

    @property
    def kept_at_end(self) -> tuple[KeptToken, ...]:
        return tuple(token for token in self.kept if token.dropped is None)

    @property
    def mean_mass(self) -> tuple[float, float, float]:
        """Over the second half of the text, when the memories have filled."""
        window, fading, eidetic = self.mass_t3[self.mass_t3.shape[0] // 2 :].mean(0).tolist()
        return window, fading, eidetic


@torch.no_grad()
def inspect_memory(model: BMojoLM, tokens_t: Tensor, threshold: float | None = None) -> list[LayerInspection]:
    """Read one text and tell what its B'MOJO layers did, and what they would keep by other selection rules.

    Each layer's rules see the same: what the layers before gave under the model's own rule.
    Args: threshold: of the rule `threshold`; None: the model's, or THRESHOLD.
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
    output = model(tokens_t[None], return_memory=True, return_hidden=True)
    assert output.memory is not None
    assert output.hidden_btd is not None
    threshold = threshold if threshold is not None else config.selection_threshold or THRESHOLD
    return [
        _inspection(index + 1, mixer, memory, config.chunk_size, _rules(model, index, x_btd, threshold))
        for index, (mixer, memory, x_btd) in enumerate(
            zip(config.mixers, output.memory, output.hidden_btd[:-1], strict=True)
        )
        if memory is not None
    ]


def _rules(model: BMojoLM, index: int, x_btd: Tensor, threshold: float) -> tuple[RuleInspection, ...]:
    """Of the layer `index`, whose input is x_btd. Nothing is marked for an oracle."""
    block = model.blocks[index]
    assert isinstance(block, Block)
    if not isinstance(block.mixer, BMojo) or not block.mixer.num_slots:
        return ()
    own: Selection = model.config.selection
    names = sorted((name for name in RULES if name != "oracle"), key=lambda name: name != own)  # stable
    configs = [
        block.mixer.config.model_copy(
            update={"selection": name, "selection_threshold": threshold if name == "threshold" else None}
        )
        for name in names
    ]
    t = x_btd.shape[1]
    precise = torch.promote_types(model.dtype, torch.float32)
    position_t = torch.arange(t, device=x_btd.device)
    rotary = RotaryTable(position_t, model.config.attention_head_dim, model.config.rope_theta, precise)
    sets = block.mixer.kept_under(configs, block.mixer_norm(x_btd), Sequence(t, 0, None, rotary))
    return tuple(
        RuleInspection(
            config.selection,
            tuple(position for position in kept_bjm[0, -1].tolist() if position >= 0),
            config.selection_threshold,
        )
        for config, kept_bjm in zip(configs, sets, strict=True)
    )


def _inspection(
    layer: int, mixer: str, memory: LayerMemory, chunk_size: int, rules: tuple[RuleInspection, ...]
) -> LayerInspection:
    innovation_t = None if memory.innovation_bt is None else memory.innovation_bt[0].float().cpu()
    kept: tuple[KeptToken, ...] = ()
    if memory.kept_position_bjm is not None:
        kept = kept_tokens(memory.kept_position_bjm[0], chunk_size)
    return LayerInspection(layer, mixer, innovation_t, kept, memory.mass_bt3[0].float().cpu(), rules)


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
