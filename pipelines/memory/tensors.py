"""What a model remembers of a document, as the files of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bmojo.long_term import RememberedDocument
from bmojo.mixers.long_term import EideticTokens
from bmojo.state import DecodingState
from pipelines.memory.store import EIDETIC, STATE, DocumentRecord, DocumentStore

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
    contents = store.read_all(records, EIDETIC)
    return [_eidetic(_loaded(store, one, EIDETIC, data)) for one, data in zip(records, contents, strict=True)]


def remembered(store: DocumentStore, record: DocumentRecord, like: DecodingState) -> RememberedDocument:
    """All of a document. Args: like: the model's state before the first token, of one row.

    Raises: DamagedError: it names the document.
    """
    (eidetic,) = eidetic_of_all(store, [record])
    found = _loaded(store, record, STATE, store.read(record, STATE))
    tensors = {name: x.to(like.position_b.device) for name, x in found.items()}
    decays = {int(name.removeprefix(_DECAY)): x for name, x in tensors.items() if name.startswith(_DECAY)}
    rest = {name: x for name, x in tensors.items() if not name.startswith(_DECAY)}
    try:
        return RememberedDocument(DecodingState.from_tensors(rest, like, record.name), eidetic, decays)
    except ValueError as error:
        raise store.damaged(record.id, record.name, STATE, error) from error


def _eidetic(tensors: Mapping[str, Tensor]) -> dict[int, EideticTokens]:
    layers = sorted({int(name.partition(".")[0]) for name in tensors})
    return {layer: EideticTokens(*(tensors[f"{layer}.{part}"][None] for part in _PARTS)) for layer in layers}


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    content: bytes = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    return content


def _loaded(store: DocumentStore, record: DocumentRecord, file: str, content: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(content)
    except SafetensorError as error:
        raise store.damaged(record.id, record.name, file, error) from error
    return tensors
