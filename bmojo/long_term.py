"""Long-term memory: documents read long before, which a model reads again inside its decoding loop.

Of a document there is kept what the model itself remembers of it: its decoding state, and the tokens that its eidetic
layers chose. A model that decodes reads the tokens of the documents nearest to each query (mixers/long_term.py), and
may begin with states that are composed of theirs. Definitions and reasons: docs/design/0063.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from bmojo.mixers.attention import Attention
from bmojo.mixers.base import Mixer
from bmojo.mixers.bmojo import BMojo, BMojoState
from bmojo.mixers.long_term import EideticTokens, ExactIndex, LongTermReader
from bmojo.mixers.mamba2 import Mamba2
from bmojo.mixers.ssm import SSMState
from bmojo.model import Block, BMojoLM
from bmojo.prefill import PIECE_TOKENS, pieces
from bmojo.state import DecodingState, LayerState
from kernels.innovation_select.reference import ranks

if TYPE_CHECKING:
    import numpy as np

Composition = Literal["fresh", "nearest", "weighted", "decayed"]
"""What decoding begins with: an empty state; the nearest document's; that one with the recurrent states of all nearest
documents, weighted by how near they are; or as if they had been read one after the other, the nearest last."""


@dataclass(frozen=True)
class RememberedDocument:
    """What is kept of a document.

    Attributes:
        state: of one row, after the document.
        eidetic: by layer, [1, m, ...].
        log_decay: of each Mamba-2 by layer [h]: log of what the document leaves of a state before it.
    """

    state: DecodingState
    eidetic: Mapping[int, EideticTokens]
    log_decay: Mapping[int, Tensor]


def eidetic_layers(model: BMojoLM) -> dict[int, BMojo]:
    """The layers that read long-term memory, by number.

    Raises: ValueError: there is none, or their rule is `oracle`, for which nobody marks tokens here.
    """
    found = {i: mixer for i, mixer in enumerate(_mixers(model)) if isinstance(mixer, BMojo) and mixer.num_slots}
    if not found:
        raise ValueError(
            f"the model {model.config.pattern} has no layer with an eidetic memory, so it has nothing to read "
            "documents with. Take a model with bmojo layers and num_eidetic above 0; `bmojo chat` keeps states of any."
        )
    if model.config.selection == "oracle":
        raise ValueError(
            "the model's selection is oracle, which keeps the tokens that a data set marks: a document has no marks. "
            "Take a model with another selection."
        )
    return found


@torch.no_grad()
def remember(
    model: BMojoLM, tokens: Sequence[int] | np.ndarray, on_read: Callable[[int], None] | None = None
) -> RememberedDocument:
    """Read a document from the beginning, in pieces.

    Args: tokens: at least one.  on_read: told the number of tokens of each piece.
    Raises: ValueError: the model has no eidetic memory, or there are no tokens.
    """
    layers = eidetic_layers(model)
    if not len(tokens):
        raise ValueError("the document has no tokens.")
    device = model.embedding.weight.device
    tokens_1t = torch.as_tensor(tokens, dtype=torch.long, device=device)[None]
    state = model.init_state(1)
    with _log_decays(model) as log_decay:
        for first, last in pieces(0, len(tokens), model.config.chunk_size, PIECE_TOKENS):
            model.read_piece(tokens_1t[:, first:last], first, state)
            if on_read is not None:
                on_read(last - first)
    eidetic = {i: _eidetic_tokens(mixer, _bmojo_state(state, i), len(tokens)) for i, mixer in layers.items()}
    return RememberedDocument(state, eidetic, log_decay)


def _eidetic_tokens(mixer: BMojo, state: BMojoState, num_tokens: int) -> EideticTokens:
    """What the slots would hold if all tokens had left the window: the M best of the slots and of the window's."""
    assert state.eidetic is not None
    config, num_slots = mixer.config, mixer.num_slots
    candidates = state.eidetic.before(num_tokens, state.window.before(num_tokens).v)
    order = candidates.position[0].argsort()  # so that ties go to the earlier
    position, log_e = candidates.position[0][order], candidates.log_e[0][order]
    last_update = (num_tokens - 1) // config.chunk_size * config.chunk_size
    is_slot = order < num_slots
    is_candidate = (position >= 0) & (is_slot | (position > last_update - config.window_size))
    rank = ranks(log_e, position, mixer.rule.tau(config)).masked_fill(~is_candidate, float("-inf"))
    best = rank.sort(descending=True, stable=True).indices[:num_slots]
    kept = order[best]
    is_kept = rank[best] > float("-inf")
    return EideticTokens(
        candidates.k[:, kept], candidates.v[:, kept], torch.where(is_kept, candidates.position[0][kept], -1)[None]
    )


@contextmanager
def _log_decays(model: BMojoLM) -> Iterator[dict[int, Tensor]]:
    """Sums of the log decays of all that Mamba-2 layers read meanwhile, of the first row."""
    found: dict[int, Tensor] = {}

    def watch(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, Mamba2)
            log_decay_h = module.log_decay(args[0])[0]
            found[layer] = found[layer] + log_decay_h if layer in found else log_decay_h

        return add

    recurrent = map(_recurrence, _mixers(model))
    hooks = [module.register_forward_pre_hook(watch(i)) for i, module in enumerate(recurrent) if _has_decay(module)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class LongTermMemory:
    """The eidetic tokens of documents, as a model's layers read them."""

    def __init__(
        self,
        model: BMojoLM,
        documents: Sequence[Mapping[int, EideticTokens]],
        num_read: int = 4,
        ages_tokens: Sequence[float] | None = None,
        tau: float | None = None,
    ) -> None:
        """Args:
            documents: by layer, as in RememberedDocument; at least one.
            num_read: documents that a layer reads at a step.
            ages_tokens: tokens that were remembered after each document.
            tau: forgetting time, in tokens: a document is as near as its share of attention times exp(-age / tau), as
                an innovation in the slots. None: nothing is forgotten.
        Raises: ValueError: the model has no eidetic memory, or its heads have fewer channels than num_read.
        """
        self._layers = eidetic_layers(model)
        self._num_read = min(num_read, len(documents))
        if self._num_read > model.config.attention_head_dim:
            raise ValueError(
                f"{num_read} documents cannot be read at a token: their attention is counted in the channels of a "
                f"head, of which this model has {model.config.attention_head_dim}. Read at most as many."
            )
        device = model.embedding.weight.device
        ages_n = torch.tensor(ages_tokens or [0.0] * len(documents), dtype=torch.float32, device=device)
        self._log_weight_n = torch.zeros_like(ages_n) if tau is None else -ages_n / tau
        self._tokens: dict[int, EideticTokens] = {}
        for layer in self._layers:
            parts = zip(*(document[layer] for document in documents), strict=True)
            k, v, position = (torch.cat(part).to(device) for part in parts)
            self._tokens[layer] = EideticTokens(k.to(model.dtype), v.to(model.dtype), position)
        self._index = {layer: ExactIndex(tokens) for layer, tokens in self._tokens.items()}

    @property
    def num_documents(self) -> int:
        return self._log_weight_n.shape[0]

    @property
    def forgotten_n(self) -> Tensor:
        """exp(-age / tau) of each document: 1, nothing of it is forgotten."""
        return self._log_weight_n.exp()

    @contextmanager
    def read_by(self, hidden_bn: Tensor) -> Iterator[Reading]:
        """Let the model's `step` read the documents, for as many rows as there are in hidden_bn: whether a row does not
        read a document, because its state holds it."""
        num_rows = hidden_bn.shape[0]
        readers = {
            layer: LongTermReader(tokens, self._index[layer], self._log_weight_n, num_rows, self._num_read)
            for layer, tokens in self._tokens.items()
        }
        try:
            for layer, reader in readers.items():
                reader.hidden_bn.copy_(hidden_bn)
                self._layers[layer].long_term = reader
            yield Reading(list(readers.values()))
        finally:
            for mixer in self._layers.values():
                mixer.long_term = None


@dataclass(frozen=True)
class Reading:
    """Documents being read, by each layer."""

    readers: list[LongTermReader]

    def attention(self) -> Tensor:
        """What each document got so far, summed over steps, mean over layers and heads, [b, n]."""
        return torch.stack([reader.attention_bn for reader in self.readers]).mean(0)


@torch.no_grad()
def read(
    model: BMojoLM, memory: LongTermMemory, tokens: Sequence[int], state: DecodingState | None, hidden_n: Tensor
) -> tuple[Tensor, DecodingState, Tensor]:
    """Read the tokens of one row, each of which reads the documents.

    Args: tokens: at least one.  state: where to continue; it is not changed. None: the beginning.
        hidden_n: documents that are not read.
    Returns: logits_1v after the last token; the new state; what each document got, attention_n as Reading.attention.
    """
    state = model.init_state(1) if state is None else state.clone()
    with memory.read_by(hidden_n[None]) as reading:
        for token in torch.as_tensor(tokens, dtype=torch.long, device=state.position_b.device):
            logits_1v, state = model.step(token[None], state)
    return logits_1v, state, reading.attention()[0]


def compose(
    model: BMojoLM, documents: Sequence[RememberedDocument], weights: Sequence[float] | None = None
) -> DecodingState:
    """The last document's state, with recurrent states that hold the others too. A single document's is its own.

    Args:
        documents: in the order in which they count as read, at least one.
        weights: of each document: S = sum_i w_i S_i / sum_i w_i. None: as if read one after the other,
            S = sum_i (prod_{j > i} decay_j) S_i.
    Raises: ValueError: a layer's states cannot be composed so.
    """
    state = documents[-1].state.clone()
    for layer, mixer in enumerate(map(_recurrence, _mixers(model))):
        if mixer is None or len(documents) == 1:
            continue
        states = [_ssm_state(document.state.layers[layer]) for document in documents]
        if None in states or (weights is None and not _has_decay(mixer)):
            raise ValueError(
                f"layer {layer} is {type(mixer).__name__}, whose states are not composed "
                f"{'by decay' if weights is None else 'by weights'}. Begin with the nearest document's state, or with "
                "none."
            )
        ssms = torch.stack([one.ssm[0] for one in states if one is not None])
        composed = _ssm_state(state.layers[layer])
        assert composed is not None
        composed.ssm[0] = (_shares(documents, layer, weights, ssms) * ssms).sum(0)
    return state


def _shares(
    documents: Sequence[RememberedDocument], layer: int, weights: Sequence[float] | None, ssms_n: Tensor
) -> Tensor:
    """How much of each document's state there is in the composed one; broadcasts with the states."""
    if weights is not None:
        share_n = torch.tensor(weights, dtype=ssms_n.dtype, device=ssms_n.device)
        return (share_n / share_n.sum()).view(-1, *[1] * (ssms_n.dim() - 1))
    log_decay_nh = torch.stack([document.log_decay[layer].to(ssms_n) for document in documents])
    of_later_nh = torch.cat([log_decay_nh[1:], torch.zeros_like(log_decay_nh[:1])])
    return of_later_nh.flip(0).cumsum(0).flip(0).exp()[..., None, None]


def _mixers(model: BMojoLM) -> list[Mixer[Any]]:
    return [block.mixer for block in model.blocks if isinstance(block, Block)]


def _recurrence(mixer: Mixer[Any]) -> Mixer[Any] | None:
    """The recurrent layer of a mixer, or the mixer if it is one; None: it has no recurrent state."""
    if isinstance(mixer, BMojo):
        return mixer.ssm
    return None if isinstance(mixer, Attention) else mixer


def _has_decay(mixer: Mixer[Any] | None) -> TypeGuard[Mamba2]:
    """Whether all that a layer forgets is one factor per head."""
    return isinstance(mixer, Mamba2)


def _ssm_state(state: LayerState) -> SSMState | None:
    """The state of a linear recurrence in a layer's."""
    inner = state.ssm if isinstance(state, BMojoState) else state
    return inner if isinstance(inner, SSMState) else None


def _bmojo_state(state: DecodingState, layer: int) -> BMojoState:
    found = state.layers[layer]
    assert isinstance(found, BMojoState)
    return found
