"""A store of documents as one model remembers them: files of tensors and JSON, each document complete or absent.

    store.json                              whose memories these are
    documents/ID.json                       written last; without it there is no document
    tensors/ID.WRITE/eidetic.safetensors    the tokens that each eidetic layer kept
    tensors/ID.WRITE/state.safetensors      the decoding state after the document, and what it leaves of one before it

ID is the SHA-256 of the document's token ids, so that the same content is stored once. Each write has a folder of its
own, which its record names: no process ever changes a file of another one.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from shlex import quote
from typing import TYPE_CHECKING, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from base.errors import DamagedError, UserError
from base.names import close_names, did_you_mean
from pipelines.storage.storage import Storage, encode_json

if TYPE_CHECKING:
    import numpy as np

FORMAT = 2
MANIFEST, DOCUMENTS, TENSORS = "store.json", "documents", "tensors"
EIDETIC, STATE = "eidetic.safetensors", "state.safetensors"
MIN_PREFIX = 4  # characters of an id that may stand for it
_UNFINISHED_S = 3600.0  # what has no record may still get one; older than this, its writer was stopped
_SUFFIX = ".json"
_HASHED = 1 << 16  # token ids at once
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
    digest: str = Field(description="SHA-256 of config, weights as they are stored, and tokenizer; on every machine.")
    tokenizer_sha256: str
    pattern: str = Field(description="The model's layers.")
    source: ModelSource | None = Field(None, description="Where `bmojo ask` loads the model from.")


class StoreManifest(BaseModel):
    """store.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    created_at: AwareDatetime
    identity: ModelIdentity


class StoredFile(BaseModel):
    """A file of a document."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    num_bytes: int


class DocumentRecord(BaseModel):
    """documents/ID.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str = Field(description="The file that the document came from.")
    part: int | None = Field(None, description="Number of the document, from 1, if the file has several.")
    model: str = Field(description="Digest of the model that remembered it.")
    dtype: str = Field(description="In which that model computed: float32, bfloat16.")
    num_tokens: int
    remembered_at: AwareDatetime
    folder: str = Field(description="Of its tensors, below tensors/.")
    files: dict[str, StoredFile]

    @property
    def title(self) -> str:
        """The name, with the number of the part."""
        return self.name if self.part is None else f"{self.name}#{self.part}"

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
    """The documents in a storage. Several processes may add to one, remove from it and verify it at once."""

    def __init__(self, storage: Storage, manifest: StoreManifest) -> None:
        self.storage, self.manifest = storage, manifest

    @classmethod
    def open(cls, storage: Storage) -> DocumentStore:
        """Raises: UserError: there is no store, or one of another format. DamagedError."""
        url = storage.url_of(MANIFEST)
        try:
            found = storage.read_json(MANIFEST)
        except FileNotFoundError:
            raise UserError(
                f"There is no store of documents at {storage.url}: it has no {MANIFEST}. Make one: bmojo remember "
                f"{quote(storage.url)} FILES --model MODEL."
            ) from None
        if found.get("format") != FORMAT:
            raise UserError(
                f"{url}: format {found.get('format')}; this version of bmojo reads {FORMAT}. Use the version that "
                "wrote it, or remember the documents in a new store."
            )
        try:
            return cls(storage, StoreManifest.model_validate(found))
        except ValidationError as error:
            raise DamagedError(
                f"{url}: {error.errors()[0]['msg']}: another version of this program wrote it. Use that version, or a "
                "new store."
            ) from error

    @classmethod
    def create(cls, storage: Storage, identity: ModelIdentity) -> DocumentStore:
        """The store there, or a new one if there is none. Raises: UserError: it is another model's."""
        if not storage.exists(MANIFEST):
            new = cls(storage, StoreManifest(format=FORMAT, created_at=datetime.now(UTC), identity=identity))
            new._refuse_documents_of_others()
            storage.create_exclusive(MANIFEST, encode_json(new.manifest.model_dump(mode="json")))
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
    def id_of(tokens: Sequence[int] | np.ndarray) -> str:
        """Digest of a document's content: of its token ids as JSON."""
        digest = hashlib.sha256(b"[")
        for start in range(0, len(tokens), _HASHED):
            block = ", ".join(str(int(token)) for token in tokens[start : start + _HASHED])
            digest.update((f", {block}" if start else block).encode())
        digest.update(b"]")
        return digest.hexdigest()

    def find(self, document_id: str) -> DocumentRecord | None:
        """The record of a document; None: it is not remembered. Raises: DamagedError: also if it is another model's."""
        try:
            record = self._record(document_id)
        except FileNotFoundError:
            return None
        if record.model != self.manifest.identity.digest:
            found = f"another model wrote it (digest {record.model[:12]})"
            raise self._damaged(repr(record.title), _record_path(document_id), found)
        return record

    def scan(self) -> tuple[list[DocumentRecord], list[Problem]]:
        """All documents, the oldest first; and those whose records cannot be used."""
        found = in_threads(self._found, self._ids())
        records = [one for one in found if isinstance(one, DocumentRecord)]
        problems = [one for one in found if isinstance(one, Problem)]
        return sorted(records, key=lambda one: (one.remembered_at, one.id)), problems

    def records(self) -> list[DocumentRecord]:
        """All documents, the oldest first. Raises: DamagedError: it names the document."""
        records, problems = self.scan()
        if problems:
            raise DamagedError(problems[0].problem)
        return records

    def add(
        self, document_id: str, name: str, num_tokens: int, contents: Mapping[str, bytes], dtype: str,
        part: int | None = None,
    ) -> DocumentRecord:  # fmt: skip
        """Return once the document is in the storage, complete. Args: contents: of its files, by name."""
        folder, files = f"{document_id}.{uuid.uuid4().hex}", {}
        for file, content in contents.items():
            self.storage.write_bytes_atomic(_tensors_path(folder, file), content)
            files[file] = StoredFile(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
        record = DocumentRecord(
            id=document_id, name=name, part=part, model=self.manifest.identity.digest, dtype=dtype,
            num_tokens=num_tokens, remembered_at=datetime.now(UTC), folder=folder, files=files,
        )  # fmt: skip
        self._write(record)
        return record

    def rename(self, record: DocumentRecord, name: str, part: int | None) -> None:
        """Call a document after another file, unless it has gone."""
        now = self.find(record.id)
        if now is not None:
            self._write(now.model_copy(update={"name": name, "part": part}))

    def read(self, record: DocumentRecord, file: str) -> bytes:
        """One of a document's files. Raises: DamagedError: it is not as it was written; names document and file."""
        try:
            content = self.storage.read_bytes(_tensors_path(record.folder, file))
        except FileNotFoundError as error:
            raise self.damaged(record, file, "it is missing") from error
        expected = record.files.get(file)
        if expected is None or len(content) != expected.num_bytes:
            wanted = "none" if expected is None else f"{expected.num_bytes:,}"
            found = f"it has {len(content):,} bytes, expected {wanted}"
            raise self.damaged(record, file, found)
        if hashlib.sha256(content).hexdigest() != expected.sha256:
            raise self.damaged(record, file, "its content does not match its digest")
        return content

    def named(self, names: Sequence[str], records: Sequence[DocumentRecord]) -> list[DocumentRecord]:
        """Those of the documents that are meant: by file, which means all its parts; by FILE#PART; by id, or the
        beginning of one.

        Raises: UserError: one of them is not there, or several ids begin so.
        """
        found = [record for name in names for record in self._named(name, records)]
        return list({record.id: record for record in found}.values())

    def remove(self, record: DocumentRecord) -> None:
        """Forget a document. Its record goes first, so that what is left of a call that dies is no document."""
        self.storage.delete(_record_path(record.id))
        self.storage.delete(_tensors_path(record.folder))

    def verify(self, on_checked: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Read every file and compare it with its digest. Also found: what stopped writers left, not what others write
        now."""
        ids = self._ids()
        problems: list[Problem] = []
        for done, document_id in enumerate(ids, 1):
            problems += self._problems(document_id)
            if on_checked is not None:
                on_checked(done, len(ids))
        reported = {problem.id for problem in problems}
        for path in self._leftovers():
            if (document_id := _id_in(path)) not in reported:
                found = f"{self.storage.url_of(path)} is left over: whatever wrote it was stopped"
                problems.append(Problem(id=document_id, name=None, problem=found))
                reported.add(document_id)
        return problems

    def remove_damaged(self, problems: Iterable[Problem]) -> int:
        """Remove what `verify` found, so that the documents can be remembered again. Returns how many were removed.

        Each is looked at once more: it may have been written again meanwhile.
        """
        removed = set()
        for document_id in {problem.id for problem in problems}:
            if not self._problems(document_id):
                continue
            try:
                self.remove(self._record(document_id))
            except (DamagedError, FileNotFoundError):  # what it named is found below, an hour after its writing
                self.storage.delete(_record_path(document_id))
            removed.add(document_id)
        for path in self._leftovers():
            self.storage.delete(path)
            removed.add(_id_in(path))
        return len(removed)

    def damaged(self, record: DocumentRecord, file: str, found: object) -> DamagedError:
        """The error for a file of a document that cannot be used."""
        return self._damaged(repr(record.title), _tensors_path(record.folder, file), found)

    def _damaged(self, document: str, path: str, found: object) -> DamagedError:
        return DamagedError(
            f"document {document}: {self.storage.url_of(path)} is damaged: {str(found).rstrip('.')}. Remove it with "
            f"bmojo store verify {quote(self.storage.url)} --remove, and remember the file again."
        )

    def _refuse_documents_of_others(self) -> None:
        """Documents may be there though store.json is not: it was lost, or deleted because it was damaged."""
        ours = self.manifest.identity
        for document_id in self._ids():
            with suppress(DamagedError, FileNotFoundError):  # of the first `verify` says more
                record = self._record(document_id)
                if record.model != ours.digest:
                    raise UserError(
                        f"{self.storage.url} has no {MANIFEST}, but documents that another model remembered, such as "
                        f"{record.title!r} (model digest {record.model[:12]}; {ours.name} has {ours.digest[:12]}). "
                        "Name that model with --model, or another folder for a new store."
                    )

    def _ids(self) -> list[str]:
        names = self.storage.list(DOCUMENTS)
        return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]

    def _found(self, document_id: str) -> DocumentRecord | Problem | None:
        try:
            return self.find(document_id)
        except DamagedError as error:
            return Problem(id=document_id, name=None, problem=str(error))

    def _problems(self, document_id: str) -> list[Problem]:
        record = self._found(document_id)
        if not isinstance(record, DocumentRecord):
            return [] if record is None else [record]
        found = []
        for file in record.files:
            try:
                self.read(record, file)
            except DamagedError as error:
                found.append(Problem(id=document_id, name=record.title, problem=str(error)))
        if found and self._found(document_id) != record:  # forgotten or written again meanwhile
            return self._problems(document_id)
        return found

    def _leftovers(self) -> list[str]:
        """Paths of what belongs to no document, and that nobody has written to for an hour: folders of tensors, and
        half-written records."""
        folders = [_tensors_path(folder) for folder in self.storage.list(TENSORS)]  # before records: written after them
        records = [f"{DOCUMENTS}/{name}" for name in self.storage.unfinished(DOCUMENTS)]
        named = {_tensors_path(record.folder) for record in self.scan()[0]}
        return [path for path in (*folders, *records) if path not in named and self._is_old(path)]

    def _is_old(self, path: str) -> bool:
        changed_at = self.storage.usage(path).changed_at
        return changed_at is not None and time.time() - changed_at > _UNFINISHED_S

    def _named(self, name: str, records: Sequence[DocumentRecord]) -> list[DocumentRecord]:
        exact = [one for one in records if name in (one.id, one.name, one.title)]
        if exact:
            return exact
        begin_so = [one for one in records if len(name) >= MIN_PREFIX and one.id.startswith(name)]
        if len(begin_so) > 1:
            ids = ", ".join(one.id for one in begin_so)
            raise UserError(f"{name!r} begins the ids of several documents: {ids}. Give more of one.")
        if begin_so:
            return begin_so
        near, url = did_you_mean(close_names(name, [one.title for one in records])), self.storage.url
        raise UserError(
            f"There is no document {name!r} in {url}.{near} bmojo store list {quote(url)} shows them; at least "
            f"{MIN_PREFIX} characters of an id stand for it."
        )

    def _record(self, document_id: str) -> DocumentRecord:
        path = _record_path(document_id)
        try:
            return DocumentRecord.model_validate(self.storage.read_json(path))
        except ValidationError as error:
            raise self._damaged(document_id[:12], path, error.errors()[0]["msg"]) from error
        except DamagedError as error:
            raise self._damaged(document_id[:12], path, error) from error

    def _write(self, record: DocumentRecord) -> None:
        self.storage.write_json_atomic(_record_path(record.id), record.model_dump(mode="json"))


def _record_path(document_id: str) -> str:
    return f"{DOCUMENTS}/{document_id}{_SUFFIX}"


def _tensors_path(folder: str, file: str = "") -> str:
    return f"{TENSORS}/{folder}/{file}".rstrip("/")


def _id_in(path: str) -> str:
    """The document that a leftover was of: tensors/ID.WRITE, documents/.ID.json.WRITE.tmp."""
    return path.rpartition("/")[2].lstrip(".").partition(".")[0]


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The result of each item, in order; an object store answers many requests at once."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))
