"""Files become documents of a store. What is there already is skipped, so the same command resumes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from base.errors import UserError
from bmojo.long_term import eidetic_layers, remember
from data.sources.document import without_bom
from pipelines.memory.store import MANIFEST, DocumentRecord, DocumentStore
from pipelines.memory.tensors import encoded
from pipelines.stages.evaluate.language_model import TextTokenizer, beginning

if TYPE_CHECKING:
    from bmojo import BMojoLM

OnProgress = Callable[[int, int], None]
"""Called with bytes done, and of all files."""


@dataclass
class Remembered:
    """What came of the files.

    Attributes:
        num_skipped: documents whose content was in the store already.
        num_replaced: documents removed, because the files they came from have other content or parts now.
        empty: files without text.
    """

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_skipped: int = 0
    num_replaced: int = 0
    empty: list[str] = field(default_factory=list)


def check_model(model: BMojoLM) -> None:
    """Raises: UserError: it has no eidetic memory, or one that reads documents only in a training."""
    try:
        eidetic_layers(model)
    except ValueError as error:
        raise UserError(str(error)) from error


def files_of(paths: Sequence[Path], store: Path | None = None) -> list[Path]:
    """The files, and those below each folder, in order. Of folders are left out: hidden files, and stores.

    Args: store: the store to be written, if it is a folder; it may lie in one of the others.
    Raises: UserError: there is no such file, or no file at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(_files_below(path, store))
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: there is no such file. Name UTF-8 text files, or folders of them.")
    if not found:
        named = ", ".join(map(str, paths))
        raise UserError(f"{named}: there are no files, other than hidden ones and stores. Name text files, or folders.")
    return list(dict.fromkeys(found))


def remember_files(
    store: DocumentStore,
    model: BMojoLM,
    tokenizer: TextTokenizer,
    files: Sequence[Path],
    part_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> Remembered:
    """Add UTF-8 text files to a store, one document each, or one for each part.

    Once all of a file is there, what the store had of it before and the file no longer has is removed.

    Args: part_tokens: the most tokens of a document; longer files become several. None: there is no limit.
    Raises: UserError: a file cannot be read; those before it are remembered.
    """
    result, done = Remembered(), 0
    sizes = [file.stat().st_size for file in files]
    before: defaultdict[str, list[DocumentRecord]] = defaultdict(list)
    for record in store.scan()[0]:
        before[record.name].append(record)
    holders: dict[str, tuple[str, int | None]] = {}  # the file and the part that each document seen so far is of
    for file, size in zip(files, sizes, strict=True):
        name = _name(file)
        ids = tokenizer.encode_batch([_read_text(file)])[0]
        if not len(ids):
            result.empty.append(name)
        most = part_tokens or max(len(ids), 1)
        for number, start in enumerate(range(0, len(ids), most), 1):
            of_part = ids[start : start + most]
            part = number if len(ids) > most else None
            done_before = done + size * start // len(ids)
            report = _within(on_progress, done_before, size * len(of_part) // len(ids), len(of_part), sum(sizes))
            tokens = np.concatenate([beginning(tokenizer), of_part]).astype(np.int64)
            document_id = remember_tokens(store, model, name, tokens, result, report, part)
            holders.setdefault(document_id, (name, part))
        for record in before[name]:
            if record.id not in holders:
                store.remove(record)
                result.num_replaced += 1
            elif holders[record.id] != (name, record.part):
                store.rename(record, *holders[record.id])
        done += size
        if on_progress is not None:
            on_progress(done, sum(sizes))
    return result


def remember_tokens(
    store: DocumentStore,
    model: BMojoLM,
    name: str,
    tokens: Sequence[int] | np.ndarray,
    result: Remembered,
    on_read: Callable[[int], None] | None = None,
    part: int | None = None,
) -> str:
    """Add a document to a store unless one of the same tokens is there. Returns its id.

    Args: result: counts what is done. part: see DocumentRecord.
    """
    document_id = store.id_of(tokens)
    if store.find(document_id) is not None:
        result.num_skipped += 1
        return document_id
    contents = encoded(remember(model, tokens, on_read))
    dtype = str(model.dtype).removeprefix("torch.")
    record = store.add(document_id, name, len(tokens), contents, dtype, part)
    result.num_documents += 1
    result.num_tokens += record.num_tokens
    result.num_bytes += record.num_bytes
    return document_id


def _within(
    on_progress: OnProgress | None, start: int, size: int, num_tokens: int, total: int
) -> Callable[[int], None]:
    """Progress in tokens of a document, told as bytes of all files."""
    read = 0

    def report(count: int) -> None:
        nonlocal read
        read += count
        if on_progress is not None:
            on_progress(start + min(size, size * read // num_tokens), total)

    return report


def _name(file: Path) -> str:
    """The file's name, with escapes for bytes that are not UTF-8."""
    return os.fsencode(file).decode(errors="backslashreplace")


def _read_text(file: Path) -> str:
    try:
        return without_bom(file.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{_name(file)}: {error.strerror}. Name UTF-8 text files, or leave this one out.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_name(file)}: byte {error.start} is not UTF-8. Convert the file to UTF-8, or leave it out; the files "
            "before it are remembered."
        ) from error


def _files_below(folder: Path, store: Path | None) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        if _is_store(here) or (store is not None and here.resolve() == store.resolve()):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (here / name for name in names if not name.startswith(".") and (here / name).is_file())


def _is_store(folder: Path) -> bool:
    manifest = folder / MANIFEST
    return manifest.is_file() and b'"tokenizer_sha256"' in manifest.read_bytes()  # others may call a file so too
