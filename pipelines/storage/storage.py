"""One place to keep durable bytes: a local directory by default, or any fsspec URL such as s3://bucket/prefix.

Every write is all-or-nothing: on a local file system through a temporary file, fsync and rename; on an object store
because one put is atomic there.
"""

from __future__ import annotations

import copy
import errno
import logging
import math
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from data.errors import DamagedDataError, DataError
from data.paths import expanded
from data.sealed import dumps, seal, unseal
from pipelines.errors import DamagedError, InfrastructureError, UserError
from pipelines.faults import CREDENTIAL_TYPES, Fault, Judgement, judge

_DRIVERS = {
    "s3": "bmojo-pipeline[s3]",
    "s3a": "bmojo-pipeline[s3]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
# Clients that try again by themselves would multiply our patience by theirs.
_TRY_ONCE: dict[str, dict[str, Any]] = {
    scheme: {"config_kwargs": {"retries": {"total_max_attempts": 1}}} for scheme in ("s3", "s3a")
}
_NO_ROOM = {errno.EDQUOT: "the disk quota is used up"}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
RETRY_S = 60.0  # how long a call is tried again
FIRST_RETRY_S = 20.0  # the same of a process that the store has never answered: the address may be wrong
_PAUSE_S = (0.25, 8.0)  # before the second try, and at most

Result = TypeVar("Result")

log = logging.getLogger(__name__)
_answered: set[str] = set()  # stores that this process has had an answer from


class Storage:
    """A root URL and operations on paths relative to it (POSIX, no leading slash, never leaving the root).

    Instances are small and picklable: the connection is made on first use in each process.

    Calls that fail by a fault that may pass (503, a lost connection, a disk's hiccup) are tried again with growing,
    random pauses for RETRY_S. Whatever fails in the end is a UserError (rights, names, credentials) or an
    InfrastructureError (out of reach, out of room); a file that is not there is a FileNotFoundError.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Check the form of `url`; nothing is contacted or created yet.

        Raises: UserError: the scheme is unknown, or the package that speaks it is not installed.
        """
        text = os.fspath(url)
        scheme, separator, rest = text.partition("://")
        self.is_local = not separator or scheme in ("file", "local")
        if self.is_local:
            try:
                path = expanded(rest if separator else text, "storage")
            except DataError as error:
                raise UserError(str(error)) from None
            self.url = os.path.abspath(path)
        else:
            self.url = text.rstrip("/")
            _require_driver(scheme, text)
        self.retry_s = math.inf  # no limit but RETRY_S, or FIRST_RETRY_S before the store's first answer

    def with_retry_s(self, retry_s: float) -> Storage:
        """The same storage for a caller with no more patience than this, such as a lease that must act in time."""
        other = copy.copy(self)
        other.retry_s = retry_s
        return other

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def url_of(self, relpath: str = "") -> str:
        """The absolute path (local) or URL of `relpath`."""
        relpath = _checked(relpath)
        return f"{self.url}/{relpath}" if relpath else self.url

    def local_path(self, relpath: str = "") -> Path:
        """`relpath` as a path of this machine. Raises ValueError where the storage is not local."""
        if not self.is_local:
            raise ValueError(f"{self.url} is not a local directory; use get_tree() to copy {relpath!r} here.")
        return Path(self.url_of(relpath))

    # ---- reading

    def read_bytes(self, relpath: str) -> bytes:
        """The whole of one file. Raises FileNotFoundError where there is none."""
        if self.is_local:
            return self._call("read", relpath, self.local_path(relpath).read_bytes)
        return bytes(self._call("read", relpath, lambda: self._fs().cat_file(self._key(relpath))))

    def read_json(self, relpath: str) -> Any:
        """The object in a file of write_json_atomic. Raises FileNotFoundError; DamagedError: it is not as written."""
        try:
            return unseal(self.read_bytes(relpath), self.url_of(relpath))
        except DamagedDataError as error:
            raise DamagedError(f"{error}. Restore it, or delete it to have what it describes made again.") from error

    def exists(self, relpath: str = "") -> bool:
        """Whether there is a file, or a directory with something in it, at `relpath`."""
        if self.is_local:
            return self._call("read", relpath, lambda: _exists(self.local_path(relpath)), missing=False)
        return bool(self._call("read", relpath, lambda: self._fs().exists(self._key(relpath))))

    def list(self, relpath: str = "") -> list[str]:
        """Sorted names directly under `relpath`; empty where there is nothing. Unfinished writes are not shown."""

        def names() -> list[str]:
            if self.is_local:
                return os.listdir(self.local_path(relpath))
            key = self._key(relpath)
            found = self._fs().ls(key, detail=False, refresh=True)
            return [PurePosixPath(path).name for path in found if path.strip("/") != key.strip("/")]

        none: list[str] = []
        return sorted(name for name in self._call("list", relpath, names, missing=none) if not _is_temporary(name))

    # ---- writing

    def write_bytes_atomic(self, relpath: str, data: bytes) -> None:
        """Replace the file in one step: a reader, or a crash, sees the old content or the new, never a part."""

        def write() -> None:
            if self.is_local:
                path = self.local_path(relpath)
                temporary = _write_temporary(path, data)
                os.replace(temporary, path)
                _fsync_directory(path.parent)
            else:
                self._fs().pipe_file(self._key(relpath), data)

        self._call("write", relpath, write)

    def write_json_atomic(self, relpath: str, value: Mapping[str, Any]) -> None:
        """As write_bytes_atomic, of an object as indented JSON with its digest in it (data.sealed)."""
        self.write_bytes_atomic(relpath, encode_json(value))

    def create_exclusive(self, relpath: str, data: bytes) -> bool:
        """Create the file with all its content unless it exists. Of several callers at once exactly one gets True.

        A try whose answer got lost may have created the file, and HTTP clients try again without telling. So where an
        object store says that the file exists, its content tells whose it is: `data` must name its writer there.
        On stores without conditional puts (not S3, GCS or Azure) the existence check and the put are two steps;
        callers that need certainty read the file again.
        """
        failed_before = False

        def create() -> bool:
            nonlocal failed_before
            try:
                if self.is_local:
                    _create_local(self.local_path(relpath), data)
                else:
                    self._fs().pipe_file(self._key(relpath), data, mode="create")
            except Exception as error:
                if self._says_exists(error, relpath):
                    return (failed_before or not self.is_local) and self.read_bytes(relpath) == data
                failed_before = True
                raise
            return True

        return self._call("write", relpath, create)

    def delete(self, relpath: str) -> None:
        """Remove a file or a whole directory; nothing happens where there is none. The root itself is refused."""
        if not _checked(relpath):
            raise ValueError(f"Refusing to delete the whole storage {self.url}.")

        def remove() -> None:
            if not self.is_local:
                fs, key = self._fs(), self._key(relpath)
                if fs.exists(key):
                    fs.rm(key, recursive=True)
                return
            path = self.local_path(relpath)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

        self._call("delete", relpath, remove, missing=None)

    def make_dir(self, relpath: str = "") -> None:
        """Make a directory and its parents (object stores have none to make)."""
        if self.is_local:
            self._call("write", relpath, lambda: self.local_path(relpath).mkdir(parents=True, exist_ok=True))

    def check_writable(self) -> None:
        """Write and remove one small file.

        Raises: UserError, InfrastructureError: what is missing (rights, the bucket; room, a connection).
        """
        probe = f".bmojo-write-test-{uuid.uuid4().hex}"
        self.write_bytes_atomic(probe, b"")
        self.delete(probe)

    # ---- whole directories

    def put_tree(self, local: Path, relpath: str) -> None:
        """Copy a local file or directory here, file by file (each atomic), in sorted order."""
        for path, relative in _walk(local):
            self._put_file(path, _joined(relpath, relative))

    def get_tree(self, relpath: str, local: Path) -> None:
        """Copy a file or directory from here to `local`. Raises FileNotFoundError where there is nothing."""
        files = self.files_under(relpath)
        if not files:
            raise FileNotFoundError(f"There is nothing at {self.url_of(relpath)}.")
        for relative in files:
            self.get_file(_joined(relpath, relative), local / relative if relative else local)

    def get_file(self, relpath: str, local: Path) -> None:
        """Copy one file from here to `local` in one step."""

        def get(temporary: Path) -> None:
            self._fs().get_file(self._key(relpath), str(temporary))

        if self.is_local:
            self._call("read", relpath, lambda: _copy(self.local_path(relpath), local))
        else:
            self._call("read", relpath, lambda: _in_one_step(local, get))

    def files_under(self, relpath: str = "") -> dict[str, str]:
        """Every file below `relpath`, by path relative to it ("" when `relpath` is itself a file), with a version mark.

        The mark changes when the content is replaced (size and time of a local file, the entity tag of an object).
        """

        def versions() -> dict[str, str]:
            if self.is_local:
                root = self.local_path(relpath)
                stats = {relative: path.stat() for path, relative in _walk(root)} if _exists(root) else {}
                return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in stats.items()}
            fs, key = self._fs(), self._key(relpath)
            fs.invalidate_cache(key)
            found = fs.find(key, detail=True)
            return {
                path[len(key) :].lstrip("/"): str(
                    info.get("ETag") or info.get("etag") or info.get("mtime") or info["size"]
                )
                for path, info in sorted(found.items())
                if not _is_temporary(PurePosixPath(path).name)
            }

        return self._call("list", relpath, versions, missing={})

    def _put_file(self, local: Path, relpath: str) -> None:
        if self.is_local:
            self._call("write", relpath, lambda: _copy(local, self.local_path(relpath)))
        else:
            self._call("write", relpath, lambda: self._fs(large=True).put_file(str(local), self._key(relpath)))

    # ---- the file system behind it

    def _fs(self, large: bool = False) -> Any:
        """The client. Args: large: for files of many parts, of which the client sends one again, not we all of them."""
        import fsspec

        scheme = self.url.partition("://")[0]
        once = {} if large else _TRY_ONCE.get(scheme, {})
        fs = fsspec.filesystem(scheme, use_listings_cache=False, **once)
        if once:
            fs.retries = 1
        return fs

    def _key(self, relpath: str) -> str:
        return str(self._fs()._strip_protocol(self.url_of(relpath)))

    def _call(self, action: str, relpath: str, function: Callable[[], Result], **missing: Result) -> Result:
        """Call `function`, again and again while its errors may pass.

        Args: missing: `missing=VALUE` is the result where there is no such file; otherwise FileNotFoundError is raised.
        """
        started = time.monotonic()
        pause_s, told = _PAUSE_S[0], False
        while True:
            try:
                result = function()
            except (UserError, InfrastructureError):
                raise
            except Exception as error:
                if self._is_missing(action, error):
                    _answered.add(self.url)
                    if missing:
                        return missing["missing"]
                    if isinstance(error, FileNotFoundError):
                        raise
                    raise FileNotFoundError(f"There is nothing at {self.url_of(relpath)}.") from error
                judgement = judge(error)
                pause_s = min(2 * pause_s, _PAUSE_S[1])
                wait_s = random.uniform(0.5, 1.0) * pause_s
                over = time.monotonic() + wait_s - started > self._patience_s()
                if judgement.fault is not Fault.TRANSIENT or over:
                    explained = self._explained(action, relpath, judgement, time.monotonic() - started)
                    if explained is None:
                        raise
                    raise explained from error
                if not told:
                    log.warning("Cannot %s %s now (%s); trying again.", action, self.url_of(relpath), _brief(judgement))
                    told = True
                time.sleep(wait_s)
            else:
                _answered.add(self.url)
                return result

    def _patience_s(self) -> float:
        configured = os.environ.get("BMOJO_STORAGE_RETRY_S")
        if configured:
            return min(self.retry_s, float(configured))
        return min(self.retry_s, RETRY_S if self.is_local or self.url in _answered else FIRST_RETRY_S)

    def _is_missing(self, action: str, error: Exception) -> bool:
        """Whether the file is not there, in a storage that is."""
        if isinstance(error, NotADirectoryError) and self.is_local:
            return action != "write" and self.local_path().is_dir()
        if not isinstance(error, FileNotFoundError):
            return False
        text = str(error)
        return "bucket does not exist" not in text and judge(error).code not in _NO_BUCKET

    def _says_exists(self, error: Exception, relpath: str) -> bool:
        """Whether a creation failed because the file itself exists (and not, say, a file in place of its directory)."""
        if self.is_local:
            return isinstance(error, FileExistsError) and self.local_path(relpath).exists()
        text = str(error)
        return isinstance(error, FileExistsError) or "PreconditionFailed" in text or "pre-conditions" in text

    def _explained(
        self, action: str, relpath: str, judgement: Judgement, waited_s: float
    ) -> UserError | InfrastructureError | None:
        """The error of ours that says what happened and what to do; None for a bug."""
        cannot, brief = f"Cannot {action} {self.url_of(relpath)}", _brief(judgement)
        error, code = judgement.error, judgement.code
        if isinstance(error, FileNotFoundError) or code in _NO_BUCKET:
            return UserError(f"{cannot}: the bucket does not exist. Create it, or set `storage` to one that does.")
        if isinstance(error, OSError) and error.filename and error.filename != self.url_of(relpath):
            cannot += f" ({error.filename})"  # a temporary file, or the local end of a copy
        if judgement.fault is Fault.FULL:
            return InfrastructureError(
                f"{cannot}: {_NO_ROOM.get(getattr(error, 'errno', None) or 0, 'no space is left')} ({brief}). Make "
                "room, then the same command resumes: finished work is kept."
            )
        if judgement.fault is Fault.TRANSIENT:
            tried = f" after {waited_s:.0f} s of trying" if waited_s >= 1 else ""
            check = "the disk" if self.is_local else "the network, the store, and its address and settings here"
            return InfrastructureError(
                f"{cannot}: {brief}{tried}. Check {check}; then the same command resumes: finished work is kept."
            )
        if judgement.fault is Fault.BUG:
            return None
        if code in CREDENTIAL_TYPES:
            return UserError(
                f"{cannot}: no valid credentials were found ({brief}). Set them the way the store's own tools read "
                "them (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
            )
        if self.is_local and isinstance(error, NotADirectoryError | FileExistsError):
            return UserError(
                f"Cannot write below {self.url_of(relpath)}: {error.filename or self.url} is a file, or is below one. "
                "Set `storage` to a directory, or to a place where one can be made."
            )
        return UserError(
            f"{cannot}: it is not allowed or not possible ({brief}). Fix that or set `storage` to another place, then "
            "run the same command again: finished work is kept."
        )


def _require_driver(scheme: str, url: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = _DRIVERS.get(scheme)
        hint = f"Install it: pip install '{package}'." if package else f"{error}."
        raise UserError(f"storage: {url} needs a package that is not installed here. {hint}") from error
    except ValueError as error:
        raise UserError(
            f"storage: {url} begins with {scheme}://, which is not a kind of storage known here. Give a local "
            "directory, or a URL that begins with s3:// or gs://."
        ) from error


def _checked(relpath: str) -> str:
    path = PurePosixPath(relpath)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{relpath!r} is not a path inside the storage.")
    return "" if str(path) == "." else str(path)


def _joined(relpath: str, relative: str) -> str:
    return str(PurePosixPath(relpath) / relative) if relative else relpath


def _walk(root: Path) -> list[tuple[Path, str]]:
    """Files under `root` with their relative POSIX paths, sorted; `root` itself as "" where it is a file."""
    if not root.is_dir():
        return [(root, "")]
    files = (path for path in root.rglob("*") if path.is_file() and not _is_temporary(path.name))
    return sorted(((path, path.relative_to(root).as_posix()) for path in files), key=lambda pair: pair[1])


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"


def _write_temporary(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _create_local(path: Path, data: bytes) -> None:
    """A hard link to a complete temporary file appears with all its content and fails if the name is taken."""
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        with open(path, "xb") as file:  # a file system without hard links
            file.write(data)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_directory(path.parent)


def encode_json(value: Mapping[str, Any]) -> bytes:
    """The object as a file of ours holds it: indented JSON with its digest in it."""
    return (dumps(seal(value), indent=2) + "\n").encode()


def fsync_tree(path: Path) -> None:
    """Return once a file, or everything under a directory, is on the disk, safe from a power cut."""
    if path.is_dir():
        for child in path.iterdir():
            fsync_tree(child)
        _fsync_directory(path)
    else:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        _fsync_directory(path.parent)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, destination: Path) -> None:
    _in_one_step(destination, lambda temporary: shutil.copyfile(source, temporary))


def _in_one_step(destination: Path, fill: Callable[[Path], object]) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(destination)
    try:
        fill(temporary)
        os.replace(temporary, destination)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _exists(path: Path) -> bool:
    """As Path.exists, but an error of the disk is not taken for absence."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _brief(judgement: Judgement) -> str:
    error = judgement.error
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or "no message"
    return f"{judgement.code}: {' '.join(text.split())[:300]}" if judgement.code not in text else text[:300]
