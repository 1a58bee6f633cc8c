"""One place to keep durable bytes: a local directory by default, or any fsspec URL such as s3://bucket/prefix.

Every write is all-or-nothing: on a local file system through a temporary file, fsync and rename; on an object store
because one put is atomic there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.errors import UserError

_DRIVERS = {
    "s3": "bmojo-pipeline[s3]",
    "s3a": "bmojo-pipeline[s3]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
_NO_ROOM = {errno.ENOSPC: "no space is left", errno.EDQUOT: "the disk quota is used up"}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


class Storage:
    """A root URL and operations on paths relative to it (POSIX, no leading slash, never leaving the root).

    Instances are small and picklable: the connection is made on first use in each process.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Check the form of `url`; nothing is contacted or created yet.

        Raises: UserError: the scheme is unknown, or the package that speaks it is not installed.
        """
        text = os.fspath(url)
        scheme, separator, rest = text.partition("://")
        self.is_local = not separator or scheme in ("file", "local")
        if self.is_local:
            path = Path(rest if separator else text).expanduser()
            self.url = os.path.abspath(path)
        else:
            self.url = text.rstrip("/")
            _require_driver(scheme, text)

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
        with self._explained("read", relpath):
            if self.is_local:
                try:
                    return self.local_path(relpath).read_bytes()
                except NotADirectoryError as error:
                    raise FileNotFoundError(f"There is nothing at {self.url_of(relpath)}.") from error
            return bytes(self._fs().cat_file(self._key(relpath)))

    def read_json(self, relpath: str) -> Any:
        """The file's JSON value. Raises FileNotFoundError; UserError where the content is not JSON."""
        try:
            return json.loads(self.read_bytes(relpath))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.url_of(relpath)} is damaged: it should hold JSON ({error}). Restore it, or delete it to have "
                "what it describes made again."
            ) from error

    def exists(self, relpath: str = "") -> bool:
        """Whether there is a file, or a directory with something in it, at `relpath`."""
        with self._explained("read", relpath):
            if self.is_local:
                return self.local_path(relpath).exists()
            return bool(self._fs().exists(self._key(relpath)))

    def list(self, relpath: str = "") -> list[str]:
        """Sorted names directly under `relpath`; empty where there is nothing. Unfinished writes are not shown."""
        with self._explained("list", relpath):
            if self.is_local:
                try:
                    names = os.listdir(self.local_path(relpath))
                except (FileNotFoundError, NotADirectoryError):
                    return []
            else:
                key = self._key(relpath)
                try:
                    found = self._fs().ls(key, detail=False, refresh=True)
                except FileNotFoundError:
                    return []
                names = [PurePosixPath(path).name for path in found if path.strip("/") != key.strip("/")]
        return sorted(name for name in names if not _is_temporary(name))

    # ---- writing

    def write_bytes_atomic(self, relpath: str, data: bytes) -> None:
        """Replace the file in one step: a reader, or a crash, sees the old content or the new, never a part."""
        with self._explained("write", relpath):
            if self.is_local:
                path = self.local_path(relpath)
                temporary = _write_temporary(path, data)
                os.replace(temporary, path)
                _fsync_directory(path.parent)
            else:
                self._fs().pipe_file(self._key(relpath), data)

    def write_json_atomic(self, relpath: str, value: Any) -> None:
        """As write_bytes_atomic, of indented JSON."""
        self.write_bytes_atomic(relpath, (json.dumps(value, indent=2) + "\n").encode())

    def create_exclusive(self, relpath: str, data: bytes) -> bool:
        """Create the file with all its content unless it exists. Of several callers at once exactly one gets True.

        On stores without conditional puts (not S3, GCS or Azure) the existence check and the put are two steps;
        callers that need certainty read the file again.
        """
        with self._explained("write", relpath):
            try:
                if self.is_local:
                    _create_local(self.local_path(relpath), data)
                else:
                    self._fs().pipe_file(self._key(relpath), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if not self.is_local and _is_precondition_failed(error):
                    return False
                raise
        return True

    def delete(self, relpath: str) -> None:
        """Remove a file or a whole directory; nothing happens where there is none. The root itself is refused."""
        if not _checked(relpath):
            raise ValueError(f"Refusing to delete the whole storage {self.url}.")
        with self._explained("delete", relpath):
            if self.is_local:
                path = self.local_path(relpath)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            else:
                fs, key = self._fs(), self._key(relpath)
                if fs.exists(key):
                    fs.rm(key, recursive=True)

    def make_dir(self, relpath: str = "") -> None:
        """Make a directory and its parents (object stores have none to make)."""
        if self.is_local:
            with self._explained("write", relpath):
                self.local_path(relpath).mkdir(parents=True, exist_ok=True)

    def check_writable(self) -> None:
        """Write and remove one small file. Raises UserError saying what is missing (rights, room, the bucket)."""
        probe = f".bmojo-write-test-{uuid.uuid4().hex}"
        self.write_bytes_atomic(probe, b"")
        self.delete(probe)

    # ---- whole directories

    def put_tree(self, local: Path, relpath: str) -> None:
        """Copy a local file or directory here, file by file (each atomic), in sorted order."""
        for path, relative in _walk(local):
            target = _joined(relpath, relative)
            with self._explained("write", target):
                if self.is_local:
                    destination = self.local_path(target)
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    temporary = _temporary_beside(destination)
                    shutil.copyfile(path, temporary)
                    os.replace(temporary, destination)
                else:
                    self._fs().put_file(str(path), self._key(target))

    def get_tree(self, relpath: str, local: Path) -> None:
        """Copy a file or directory from here to `local`. Raises FileNotFoundError where there is nothing."""
        files = self.files_under(relpath)
        if not files:
            raise FileNotFoundError(f"There is nothing at {self.url_of(relpath)}.")
        for relative in files:
            self.get_file(_joined(relpath, relative), local / relative if relative else local)

    def get_file(self, relpath: str, local: Path) -> None:
        """Copy one file from here to `local` in one step."""
        with self._explained("read", relpath):
            local.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary_beside(local)
            if self.is_local:
                shutil.copyfile(self.local_path(relpath), temporary)
            else:
                self._fs().get_file(self._key(relpath), str(temporary))
            os.replace(temporary, local)

    def files_under(self, relpath: str = "") -> dict[str, str]:
        """Every file below `relpath`, by path relative to it ("" when `relpath` is itself a file), with a version mark.

        The mark changes when the content is replaced (size and time of a local file, the entity tag of an object).
        """
        with self._explained("list", relpath):
            if self.is_local:
                root = self.local_path(relpath)
                stats = {relative: path.stat() for path, relative in _walk(root)} if root.exists() else {}
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

    # ---- the file system behind it

    def _fs(self) -> Any:
        import fsspec

        scheme = self.url.partition("://")[0]
        return fsspec.filesystem(scheme, use_listings_cache=False)

    def _key(self, relpath: str) -> str:
        return str(self._fs()._strip_protocol(self.url_of(relpath)))

    @contextmanager
    def _explained(self, action: str, relpath: str) -> Iterator[None]:
        """Turn what the user must mend (rights, room, bucket, credentials) into a UserError."""
        try:
            yield
        except FileNotFoundError as error:
            if "bucket does not exist" in str(error) or "NoSuchBucket" in str(error):
                raise UserError(
                    f"Cannot {action} {self.url_of(relpath)}: the bucket does not exist. Create it, or set `storage` "
                    "to one that does."
                ) from error
            raise
        except OSError as error:
            reason = _NO_ROOM.get(error.errno or 0)
            if reason is None and (error.errno in _NOT_ALLOWED or isinstance(error, PermissionError)):
                reason = f"it is not allowed ({error.strerror or error})"
            if reason is None:
                raise
            raise UserError(
                f"Cannot {action} {self.url_of(relpath)}: {reason}. Mend that or set `storage` to another place, then "
                "run the same command again: finished work is kept."
            ) from error
        except Exception as error:
            if type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError"):
                raise UserError(
                    f"Cannot {action} {self.url_of(relpath)}: no credentials were found. Set them the way the store's "
                    "own tools read them (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
                ) from error
            raise


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


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_precondition_failed(error: OSError) -> bool:
    text = str(error)
    return "PreconditionFailed" in text or "pre-conditions" in text or "ConditionalRequestConflict" in text
