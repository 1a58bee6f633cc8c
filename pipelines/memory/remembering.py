"""Files become documents of a store. What is there already is skipped, so the same command resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError
from bmojo.long_term import eidetic_layers, remember
from pipelines.memory.store import DocumentStore
from pipelines.memory.tensors import encoded
from pipelines.stages.evaluate.language_model import TextTokenizer, beginning

if TYPE_CHECKING:
    from bmojo import BMojoLM

OnProgress = Callable[[int, int], None]
"""Called with bytes done, and of all files."""


@dataclass
class Remembered:
    """What came of the files. num_skipped: documents whose content was in the store already."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_skipped: int = 0
    empty: list[str] = field(default_factory=list)


def check_model(model: BMojoLM) -> None:
    """Raises: UserError: it has no eidetic memory."""
    try:
        eidetic_layers(model)
    except ValueError as error:
        raise UserError(str(error)) from error


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files, and those below each folder, in order; hidden ones of folders are left out.

    Raises: UserError: there is no such file, or no file in a folder.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file, path)]
            if not inside:
                raise UserError(f"{path}: the folder holds no files. Name text files, or a folder of them.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: there is no such file. Name UTF-8 text files, or folders of them.")
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

    Args: part_tokens: the most tokens of a document; longer files become several. None: there is no limit.
    Raises: UserError: a file cannot be read; those before it are remembered.
    """
    result, done = Remembered(), 0
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        ids = tokenizer.encode_batch([_read_text(file)])[0].tolist()
        if not ids:
            result.empty.append(str(file))
        for number, start in enumerate(range(0, len(ids), part_tokens or max(len(ids), 1)), 1):
            part = ids[start : start + (part_tokens or len(ids))]
            name = f"{file}#{number}" if part_tokens and len(ids) > part_tokens else str(file)
            done_before = done + size * start // len(ids)
            report = _within(on_progress, done_before, size * len(part) // len(ids), len(part), sum(sizes))
            remember_tokens(store, model, name, [*beginning(tokenizer), *part], result, report)
        done += size
        if on_progress is not None:
            on_progress(done, sum(sizes))
    return result


def remember_tokens(
    store: DocumentStore,
    model: BMojoLM,
    name: str,
    tokens: Sequence[int],
    result: Remembered,
    on_read: Callable[[int], None] | None = None,
) -> None:
    """Add a document to a store unless one of the same tokens is there. Args: result: counts what is done."""
    document_id = store.id_of(tokens)
    if store.find(document_id) is not None:
        result.num_skipped += 1
        return
    contents = encoded(remember(model, tokens, on_read))
    record = store.add(document_id, name, len(tokens), contents)
    result.num_documents += 1
    result.num_tokens += record.num_tokens
    result.num_bytes += record.num_bytes


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


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}. Name UTF-8 text files, or leave this one out.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: byte {error.start} is not UTF-8. Convert the file to UTF-8, or leave it out; the files before it "
            "are remembered."
        ) from error


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
