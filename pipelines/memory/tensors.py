"""What a model remembers of a document, as the files of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bmojo.long_term import RememberedDocument
from bmojo.mixers.long_term import EideticTokens
from bmojo.state import DecodingState
from pipelines.memory.store import EIDETIC, STATE, DocumentRecord, DocumentStore, in_threads

_DECAY = "log_decay."  # before a layer's number
_PARTS = EideticTokens._fields


def encoded(document: RememberedDocument) -> dict[str, bytes]:
    """Contents of the files by their names."""
    eidetic = {
        f"{layer}.{part}": x[0]
        for layer, tokens in document.eidetic.items()
        for part, x in zip(_PARTS, tokens, strict=True)
    }
    decays = {f"{_DECAY}{layer}": x for layer, x in document.log_decay.items()}
    return {EIDETIC: _saved(eidetic), STATE: _saved({**document.state.tensors(), **decays})}


def eidetic_of_all(store: DocumentStore, records: Sequence[DocumentRecord]) -> list[dict[int, EideticTokens]]:
    """What each layer kept of each document. Raises: DamagedError: it names the document."""
    return in_threads(lambda record: _eidetic(_loaded(store, record, EIDETIC)), records)


def remembered(store: DocumentStore, record: DocumentRecord, like: DecodingState) -> RememberedDocument:
    """All of a document. Args: like: the model's state before the first token, of one row.

    What a model remembered in another precision, on another machine, is rounded to this one's.
    Raises: DamagedError: it names the document.
    """
    (eidetic,) = eidetic_of_all(store, [record])
    tensors, expected = _loaded(store, record, STATE), like.tensors()
    device = like.position_b.device
    decays = {int(name.removeprefix(_DECAY)): x.to(device) for name, x in tensors.items() if name.startswith(_DECAY)}
    rest = {name: x.to(device) for name, x in tensors.items() if not name.startswith(_DECAY)}
    for name in rest.keys() & expected.keys():
        if rest[name].is_floating_point() and expected[name].is_floating_point():
            rest[name] = rest[name].to(expected[name].dtype)
    try:
        return RememberedDocument(DecodingState.from_tensors(rest, like, record.title), eidetic, decays)
    except ValueError as error:
        raise store.damaged(record, STATE, error) from error


def _eidetic(tensors: Mapping[str, Tensor]) -> dict[int, EideticTokens]:
    layers = sorted({int(name.partition(".")[0]) for name in tensors})
    return {layer: EideticTokens(*(tensors[f"{layer}.{part}"][None] for part in _PARTS)) for layer in layers}


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    content: bytes = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    return content


def _loaded(store: DocumentStore, record: DocumentRecord, file: str) -> dict[str, Tensor]:
    content = store.read(record, file)
    try:
        tensors: dict[str, Tensor] = load(content)
    except SafetensorError as error:
        raise store.damaged(record, file, error) from error
    return tensors
