"""Files in object stores and behind other URLs that fsspec reaches: found, looked at, read by ranges of bytes."""

from __future__ import annotations

import errno
import glob
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.errors import DataError, SourceUnavailableError

_BUFFER_BYTES = 4 << 20  # of one request
_PACKAGES = {"s3": "bmojo-pipeline[s3]", "s3a": "bmojo-pipeline[s3]", "gs": "gcsfs", "gcs": "gcsfs"}
_PACKAGES |= {"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
# Names of classes, of libraries that need not be installed.
_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
_AWAY = {"BotoCoreError", "ClientError", "ClientConnectionError", "ConnectionError", "TimeoutError", "HTTPClientError"}


def is_url(path: str) -> bool:
    """Whether a path that a user wrote is the URL of a file elsewhere."""
    return "://" in path


class _Stat(NamedTuple):
    st_size: int


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, with what the readers use of Path."""

    url: str
    _listed: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    def stat(self) -> _Stat:
        """The size: as it was listed, else as it is now. Raises FileNotFoundError, PermissionError; as `open`."""
        return _Stat(int(self._info()["size"]))

    def version(self) -> str:
        """What changes with the content: the entity tag where the store has one, else the time of change; the size."""
        info = self._info()
        names = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
        mark = next((info[name] for name in names if info.get(name) is not None), "")
        return f"{mark} {info['size']}"

    def open(self) -> BinaryIO:
        """Open it for reading.

        Raises, also when it is read: SourceUnavailableError: the store does not answer. DataError: it needs a package
            or credentials.
        """
        return io.BufferedReader(_Ranges(self.url, self.stat().st_size), _BUFFER_BYTES)

    def _info(self) -> Mapping[str, Any]:
        if self._listed is not None:
            return self._listed
        with _answering(self.url):
            fs, key = _store(self.url)
            info: Mapping[str, Any] = fs.info(key)
            return info


AnyPath = Path | RemoteFile


def path_of(name: str) -> AnyPath:
    """The file that a Part names."""
    return RemoteFile(name) if is_url(name) else Path(name)


def open_file(path: AnyPath) -> BinaryIO:
    """Open a file of either kind for reading."""
    return path.open() if isinstance(path, RemoteFile) else open(path, "rb", buffering=1 << 20)


def find_remote(pattern: str, example: str) -> list[RemoteFile]:
    """The files that a URL, perhaps with wildcards, names. Raises DataError: there is none; as RemoteFile.open."""
    with _answering(pattern):
        fs, key = _store(pattern)
        if glob.has_magic(pattern):
            listed = fs.glob(key, detail=True)
        else:
            listed = {key: fs.info(key)}
    files = {name: info for name, info in sorted(listed.items()) if info["type"] == "file"}
    if not files and glob.has_magic(pattern):
        raise DataError(f"source.paths: no file matches {pattern!r}. Correct the pattern.")
    if not files:
        raise DataError(
            f"source.paths: {pattern} is a folder. Name files in it, for example {pattern.rstrip('/')}/{example}."
        )
    return [RemoteFile(str(fs.unstrip_protocol(name)), info) for name, info in files.items()]


class _Ranges(io.RawIOBase):
    """A file of known size that is read by ranges, one request each."""

    def __init__(self, url: str, size: int) -> None:
        self.name, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        with _answering(self.name):
            fs, key = _store(self.name)
            data = fs.cat_file(key, start=self._position, end=end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _store(url: str) -> tuple[Any, str]:
    """The client of the URL's store, which fsspec keeps for the process, and the file's name there."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        fs = fsspec.filesystem(scheme, **({"use_listings_cache": False} if scheme != "memory" else {}))
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        hint = f"Install it: pip install '{package}'." if package else f"{error}."
        raise DataError(f"source.paths: {url} needs a package that is not installed here. {hint}") from error
    except ValueError as error:
        raise DataError(
            f"source.paths: {url} begins with {scheme}://, which is no store known here. Give a path, or a URL that "
            "begins with s3:// or gs://."
        ) from error
    return fs, str(fs._strip_protocol(url))


@contextmanager
def _answering(url: str) -> Iterator[None]:
    """Errors of a store's client become ours."""
    try:
        yield
    except (DataError, SourceUnavailableError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), url) from error
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        brief = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        if kinds & _CREDENTIALS:
            raise DataError(
                f"source.paths: {url}: no valid credentials were found ({brief}). Set them the way the store's own "
                "tools read them (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
            ) from error
        if kinds & _AWAY or isinstance(error, OSError):
            raise SourceUnavailableError(
                f"source.paths: {url} cannot be read now ({brief}). Check the network, the store and its address; then "
                "run again."
            ) from error
        raise
