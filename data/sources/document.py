"""What sources hand out, and the parts they are cut into."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from data.config import InvalidUtf8, Source
from data.errors import DataError
from data.records import Reason
from data.sources.remote import AnyPath, path_of

if TYPE_CHECKING:
    import numpy as np

BOM = b"\xef\xbb\xbf"
_NOT_UTF8 = {  # first bytes of files that no policy for invalid UTF-8 makes text of; longer ones first
    b"\xff\xfe\x00\x00": ("UTF-32", "Convert the file: iconv -f UTF-32 -t UTF-8."),
    b"\x00\x00\xfe\xff": ("UTF-32", "Convert the file: iconv -f UTF-32 -t UTF-8."),
    b"\xff\xfe": ("UTF-16", "Convert the file: iconv -f UTF-16 -t UTF-8."),
    b"\xfe\xff": ("UTF-16", "Convert the file: iconv -f UTF-16 -t UTF-8."),
    b"\x1f\x8b": ("compressed by gzip", "Name the file .jsonl.gz if it holds JSON lines, else decompress it."),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "Name the file .jsonl.zst if it holds JSON lines, else decompress it."),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A text and a name that finds it again, such as `books.jsonl:12`.

    start, end: the bytes of its file that hold it, `end` exclusive; -1 where they are not known.
    """

    id: str
    text: str
    start: int = -1
    end: int = -1

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.text)

    @property
    def raw(self) -> bytes:
        """The content as bytes: equal for equal documents. Not kept, as it may be large."""
        return self.text.encode("utf-8")

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return len(self.raw)


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """A document of token ids, and a name that finds it again.

    Attributes:
        ids: (t,) integers; the end-of-document id is not among them.
        start, end: the bytes of its file that hold it, `end` exclusive; -1 where there is none.
        num_bytes: bytes of text that they stand for; 0 if they are no text.
        loss_mask: (t,) bool, the tokens that the loss counts, and the end not; None: all tokens and the end.
    """

    id: str
    ids: np.ndarray
    start: int = -1
    end: int = -1
    num_bytes: int = 0
    loss_mask: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.ids)

    @cached_property
    def raw(self) -> bytes:
        """The content as bytes: equal for equal documents, whatever the type of the ids."""
        return self.ids.astype("<u4").tobytes()


AnyDocument = Document | TokenDocument


@dataclass(frozen=True)
class LeftOut:
    """A document that is not handed on, so that it can be counted."""

    id: str
    reason: Reason


@dataclass(frozen=True)
class Part:
    """A stretch of one file (or data set) that is read from start to end.

    Attributes:
        path: the file; for python_stdlib relative to the library's folder; "" for a source without files.
        start, end: bytes of the text (.txt, .jsonl) or file (kind bytes), row groups (.parquet), rows (huggingface),
            ids or documents (kind tokens), documents (kind synthetic); `end` is exclusive.
        num_bytes: about how much text it holds, for planning.
        file_bytes: size of the file when the plan was made; another size now means it changed.
        entry: where a compressed file can be entered before `start`: its byte, and how much text lies before that.
    """

    path: str
    start: int
    end: int
    num_bytes: int
    file_bytes: int
    entry: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Slice:
    """The unit of parallel work: parts that one task reads in order. Picklable, and small.

    source: how to read them; of `files` without its paths, of which there may be many.
    """

    index: int
    source: Source
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """About how much text it holds."""
        return sum(part.num_bytes for part in self.parts)


def decode_utf8(raw: bytes, policy: InvalidUtf8, where: object, first_byte: int | None = None) -> str | None:
    """Text of `raw` by the policy for invalid UTF-8; None leaves the document out.

    Args:
        where: the file and line; made a string only for a message, as counting lines takes long.
        first_byte: offset of `raw` in the file, where known.
    Raises: DataError: the policy is `error` and the bytes are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if policy == "replace":
            return raw.decode("utf-8", "replace")
        if policy == "skip_document":
            return None
        at = f"byte {error.start}" + ("" if first_byte is None else f" (byte {first_byte + error.start} of the file)")
        raise DataError(
            f"{where}: invalid UTF-8 at {at}: found 0x{raw[error.start]:02x}, {error.reason}. Convert the file from "
            "its encoding (such as iconv -f LATIN1 -t UTF-8), or set source.invalid_utf8 to `replace` or "
            "`skip_document`."
        ) from None


def check_unchanged(part: Part) -> None:
    """Check that a part's file is still the one that was planned for. Raises DataError: it is not."""
    path = path_of(part.path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}. The file was there when the work was planned: every machine that tokenizes "
            "must see it at the same path."
        ) from error
    if size != part.file_bytes:
        raise DataError(
            f"{path}: {size} bytes, but {part.file_bytes} when the work was planned. Leave the files alone while they "
            "are tokenized, then run again."
        )


def check_beginning(raw: bytes, where: str) -> None:
    """Check the first bytes of a file of text. Raises DataError: they say that it is in another encoding or compressed.

    Without this the policies `replace` and `skip_document` would make noise or nothing of the whole file.
    """
    for mark, (what, advice) in _NOT_UTF8.items():
        if raw.startswith(mark):
            raise DataError(f"{where}: this is {what} (it begins with {mark.hex(' ')}), expected UTF-8. {advice}")


def without_bom(line: bytes) -> bytes:
    """A line without the byte-order marks before it: files joined by cat have them inside, empty ones several."""
    while line.startswith(BOM):
        line = line[len(BOM) :]
    return line


def is_blank(line: bytes) -> bool:
    """Whether a line, without byte-order marks, holds nothing but white space."""
    return not line.strip()


@contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """A file that is gone or forbidden is told by its name."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR):
            raise
        raise DataError(
            f"{path}: cannot be read: {os.strerror(error.errno)}. Allow reading it on every machine that "
            "works on the text, or name other files."
        ) from error


def text_of(value: object, policy: InvalidUtf8, where: object) -> str | None:
    """The text in a value of a column: a string, or bytes in UTF-8. None leaves the document out.

    Raises: DataError: it is neither, or not valid UTF-8 and the policy is `error`.
    """
    if isinstance(value, str):
        return mend_surrogates(value, policy, where)
    if isinstance(value, bytes):
        return decode_utf8(value, policy, where)
    found = "null" if value is None else type(value).__name__
    raise DataError(
        f"{where}: found {found}, expected a string. Drop such rows, or set source.text_field to a column of text."
    )


def mend_surrogates(text: str, policy: InvalidUtf8, where: object) -> str | None:
    """A text without lone surrogates, which JSON escapes such as "\\ud800" smuggle in and UTF-8 cannot express.

    Raises: DataError: the policy is `error` and there is one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if policy == "replace":
            return _SURROGATE.sub("\ufffd", text)
        if policy == "skip_document":
            return None
        raise DataError(
            f"{where}: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which is not "
            "valid UTF-8. Fix the text, or set source.invalid_utf8 to `replace` or `skip_document`."
        ) from None
    return text
