"""A store of documents as one model remembers them: files of tensors and JSON, each document complete or absent.

    store.json                          whose memories these are
    documents/ID/eidetic.safetensors    the tokens that each eidetic layer kept
    documents/ID/state.safetensors      the decoding state after the document, and what it leaves of one before it
    documents/ID/document.json          written last; without it there is no document

ID is the SHA-256 of the document's token ids, so that the same content is stored once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from base.errors import DamagedError, UserError
from base.names import close_names, did_you_mean
from pipelines.storage.storage import Storage, encode_json

FORMAT = 1
MANIFEST, DOCUMENTS = "store.json", "documents"
EIDETIC, STATE, RECORD = "eidetic.safetensors", "state.safetensors", "document.json"
_THREADS = 16  # requests to an object store at once
Item = TypeVar("Item")
Result = TypeVar("Result")


class ModelSource(BaseModel):
    """Where a model was loaded from, so that it can be loaded again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Folder of an exported model, or a run's id.")
    storage: str | None = Field(None, description="Where the run is kept; null: it is an exported model.")
    stage: str | None = None
    step: int | None = None


class ModelIdentity(BaseModel):
    """Whose memories a store holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="For people.")
    digest: str = Field(description="SHA-256 of config, weights as they compute, and tokenizer.")
    tokenizer_sha256: str
    pattern: str = Field(description="The model's layers.")
    source: ModelSource | None = Field(None, description="Where `bmojo ask` loads the model from.")


class StoreManifest(BaseModel):
    """store.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    created_at: float = Field(description="Seconds since the epoch.")
    identity: ModelIdentity


class StoredFile(BaseModel):
    """A file of a document."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    num_bytes: int


class DocumentRecord(BaseModel):
    """document.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str = Field(description="The file that the document came from, and the number of its part if it has several.")
    num_tokens: int
    remembered_at: float = Field(description="Seconds since the epoch.")
    files: dict[str, StoredFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())


class Problem(BaseModel):
    """What `verify` found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str | None = Field(description="Of the document; null: its record cannot be read, or was never written.")
    problem: str


class DocumentStore:
    """The documents in a storage. Several processes may add to one; of equal documents one stays."""

    def __init__(self, storage: Storage, manifest: StoreManifest) -> None:
        self.storage, self.manifest = storage, manifest

    @classmethod
    def open(cls, storage: Storage) -> DocumentStore:
        """Raises: UserError: there is no store. DamagedError."""
        try:
            manifest = StoreManifest.model_validate(storage.read_json(MANIFEST))
        except FileNotFoundError:
            raise UserError(
                f"There is no store of documents at {storage.url}: it has no {MANIFEST}. Make one: bmojo remember "
                f"{storage.url} FILES --model MODEL."
            ) from None
        except ValidationError as error:
            raise DamagedError(
                f"{storage.url_of(MANIFEST)}: {error.errors()[0]['msg']}: another version of this program wrote it. "
                "Use that version, or a new store."
            ) from error
        if manifest.format != FORMAT:
            raise UserError(
                f"{storage.url_of(MANIFEST)}: format {manifest.format}; this version of bmojo reads {FORMAT}. Use the "
                "version that wrote it, or a new store."
            )
        return cls(storage, manifest)

    @classmethod
    def create(cls, storage: Storage, identity: ModelIdentity) -> DocumentStore:
        """The store there, or a new one if there is none. Raises: UserError: it is another model's."""
        manifest = StoreManifest(format=FORMAT, created_at=time.time(), identity=identity)
        if not storage.exists(MANIFEST):
            storage.create_exclusive(MANIFEST, encode_json(manifest.model_dump()))
        store = cls.open(storage)
        store.check_model(identity)
        return store

    def check_model(self, identity: ModelIdentity) -> None:
        """Raises: UserError: other weights, another config or another tokenizer than those that wrote the store."""
        ours = self.manifest.identity
        if ours.digest == identity.digest:
            return
        other = "the tokenizer differs" if ours.tokenizer_sha256 != identity.tokenizer_sha256 else "the weights differ"
        raise UserError(
            f"The store {self.storage.url} holds memories of model {ours.name} ({ours.pattern}, digest "
            f"{ours.digest[:12]}), which mean nothing to {identity.name} ({identity.pattern}, digest "
            f"{identity.digest[:12]}): {other}. Name that model with --model, or remember the documents in a new store."
        )

    # ---- documents

    @staticmethod
    def id_of(tokens: Sequence[int]) -> str:
        """Digest of a document's content."""
        return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()

    def find(self, document_id: str) -> DocumentRecord | None:
        """The record of a document; None: it is not remembered. Raises: DamagedError."""
        try:
            return self._record(document_id)
        except FileNotFoundError:
            return None

    def records(self) -> list[DocumentRecord]:
        """All documents, the oldest first. Raises: DamagedError: it names the document."""
        found = _in_threads(self.find, self.storage.list(DOCUMENTS))
        return sorted((one for one in found if one is not None), key=lambda one: (one.remembered_at, one.id))

    def add(self, document_id: str, name: str, num_tokens: int, contents: Mapping[str, bytes]) -> DocumentRecord:
        """Return once the document is in the storage, complete. Args: contents: of its files, by name."""
        files = {}
        for file, content in contents.items():
            self.storage.write_bytes_atomic(_path(document_id, file), content)
            files[file] = StoredFile(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
        record = DocumentRecord(
            id=document_id, name=name, num_tokens=num_tokens, remembered_at=time.time(), files=files
        )
        self.storage.write_json_atomic(_path(document_id, RECORD), record.model_dump())
        return record

    def read(self, record: DocumentRecord, file: str) -> bytes:
        """One of a document's files. Raises: DamagedError: it is not as it was written; names document and file."""
        try:
            content = self.storage.read_bytes(_path(record.id, file))
        except FileNotFoundError as error:
            raise self.damaged(record.id, record.name, file, "it is missing") from error
        expected = record.files.get(file)
        if expected is None or len(content) != expected.num_bytes:
            wanted = "none" if expected is None else f"{expected.num_bytes:,}"
            found = f"it has {len(content):,} bytes, expected {wanted}"
            raise self.damaged(record.id, record.name, file, found)
        if hashlib.sha256(content).hexdigest() != expected.sha256:
            raise self.damaged(record.id, record.name, file, "its content does not match its digest")
        return content

    def read_all(self, records: Sequence[DocumentRecord], file: str) -> list[bytes]:
        """That file of each document; see `read`."""
        return _in_threads(lambda record: self.read(record, file), records)

    def named(self, names: Sequence[str]) -> list[DocumentRecord]:
        """Documents by name, id, or the beginning of an id. Raises: UserError: one of them is not there, or several."""
        records = self.records()
        return [self._named(name, records) for name in names]

    def remove(self, record: DocumentRecord) -> None:
        """Forget a document. Its record goes first, so that what is left of a call that dies is no document."""
        self.storage.delete(_path(record.id, RECORD))
        self.storage.delete(_path(record.id))

    def verify(self, on_checked: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Read every file and compare it with its digest. Also found: what a killed process left half written."""
        ids = self.storage.list(DOCUMENTS)
        problems: list[Problem] = []
        for done, document_id in enumerate(ids, 1):
            problems += self._problems(document_id)
            if on_checked is not None:
                on_checked(done, len(ids))
        return problems

    def remove_damaged(self, problems: Iterable[Problem]) -> None:
        """Remove what `verify` found, so that the documents can be remembered again."""
        for document_id in {problem.id for problem in problems}:
            self.storage.delete(_path(document_id, RECORD))
            self.storage.delete(_path(document_id))

    def _problems(self, document_id: str) -> list[Problem]:
        try:
            record = self._record(document_id)
        except FileNotFoundError:
            return [Problem(id=document_id, name=None, problem=f"has no {RECORD}: whatever wrote it was stopped")]
        except DamagedError as error:
            return [Problem(id=document_id, name=None, problem=str(error))]
        found = []
        for file in record.files:
            try:
                self.read(record, file)
            except DamagedError as error:
                found.append(Problem(id=document_id, name=record.name, problem=str(error)))
        return found

    def _named(self, name: str, records: Sequence[DocumentRecord]) -> DocumentRecord:
        for candidates in (
            [one for one in records if one.id == name],
            [one for one in records if one.name == name],
            [one for one in records if one.id.startswith(name)],
        ):
            if len(candidates) == 1:
                return candidates[0]
            if candidates:
                ids = ", ".join(one.id[:12] for one in candidates)
                raise UserError(f"{name!r} fits several documents: {ids}. Give one of these ids.")
        near, url = did_you_mean(close_names(name, [one.name for one in records])), self.storage.url
        raise UserError(f"There is no document {name!r} in {url}.{near} bmojo store list {url} shows them.")

    def _record(self, document_id: str) -> DocumentRecord:
        path = _path(document_id, RECORD)
        try:
            return DocumentRecord.model_validate(self.storage.read_json(path))
        except (DamagedError, ValidationError) as error:
            raise self.damaged(document_id, None, RECORD, error) from error

    def damaged(self, document_id: str, name: str | None, file: str, found: object) -> DamagedError:
        """The error for a file of a document that cannot be used."""
        named, url = repr(name) if name else document_id[:12], self.storage.url_of(_path(document_id, file))
        return DamagedError(
            f"document {named}: {url} is damaged: {found}. Remove it with bmojo store verify {self.storage.url} "
            "--remove, and remember the file again."
        )


def _path(document_id: str, file: str = "") -> str:
    return f"{DOCUMENTS}/{document_id}/{file}".rstrip("/")


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The result of each item, in order; an object store answers many requests at once."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))
