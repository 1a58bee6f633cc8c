"""A stage's output directory, the same to the stage whether the storage is a local disk or an object store."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.cache import cache_dir
from base.config import StrictConfig
from base.errors import DamagedError
from base.files import files_below, fsync_tree
from base.verified import check_file
from pipelines.storage import LocalStorage, Storage, open_storage
from pipelines.storage.storage import encode_json

RECORD = "record.json"
SCRATCH = "artifacts"  # the folder of scratch copies in the cache
_FETCHED = ".bmojo-fetched.json"
# Shards are vouched for by their index, what else a slice wrote by its record, a checkpoint by its manifest; records
# and results of tasks have digests in them.
_VOUCHED_FOR = re.compile(
    r"\.mds$|/documents\.parquet$|^(slices|validation_streams|held_out|checkpoints|tasks)/|^record\.json$"
    r"|(^|/)\.bmojo-fetched\.json$"
)


class FileEntry(StrictConfig):
    """What a file must be."""

    size_bytes: int
    sha256: str


class ArtifactDir:
    """A durable directory `url` and the place on this machine, `local`, where its files are written and read.

    On file storage the two are one, and publish and fetch copy nothing. On an object store `local` is a scratch copy:
    what a stage wrote becomes durable when it is published, and what another machine wrote appears when it is fetched.
    Picklable: each process that unpickles it uses its own machine's scratch directory.
    """

    def __init__(self, storage: Storage, relpath: str) -> None:
        self.storage = storage
        self.relpath = relpath

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> ArtifactDir:
        """The artifact directory at an absolute URL or local path."""
        parent, _, name = os.fspath(url).rstrip("/").rpartition("/")
        return cls(open_storage(parent or "."), name)

    def reference_to(self, other: ArtifactDir, relpath: str) -> str:
        """What to write into this artifact's record to name a part of another: its path in the storage they share, so
        that the storage can be moved; else its URL."""
        return other._key(relpath) if other.storage == self.storage else other.storage.url_of(other._key(relpath))

    def referred(self, reference: str) -> ArtifactDir:
        """What reference_to() named."""
        is_url = "://" in reference or os.path.isabs(reference)
        return ArtifactDir.at(reference) if is_url else ArtifactDir(self.storage, reference)

    def __repr__(self) -> str:
        return f"ArtifactDir({self.url!r})"

    @property
    def url(self) -> str:
        """Where the durable files are: an absolute path, or a URL."""
        return self.storage.url_of(self.relpath)

    @property
    def remedy(self) -> str:
        """What to do about a damaged file in it, as a sentence."""
        return f"Restore the file, or delete {self.url} and run again: its stage is then done again."

    @property
    def local(self) -> Path:
        """The directory on this machine in which a stage writes; it exists."""
        path = self.storage.path(self.relpath) if isinstance(self.storage, LocalStorage) else self.scratch
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def scratch(self) -> Path:
        """The scratch copy on this machine, whether it exists or not; on file storage there is none."""
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return cache_dir() / SCRATCH / f"{Path(self.relpath).name}-{digest}"

    def publish(self, relpath: str = "") -> None:
        """Make a finished local file or directory durable.

        Files go one by one, so a directory can be caught half-way: write what marks it complete last, by its own call.
        Raises: FileNotFoundError: there is nothing at `relpath`.
        """
        source = self.local / relpath
        if not source.exists():
            raise FileNotFoundError(f"{source}: nothing to publish.")
        if isinstance(self.storage, LocalStorage):
            fsync_tree(source)
        else:
            self.storage.put_tree(source, self._key(relpath))

    def fetch(self, relpath: str = "") -> Path:
        """A local copy of a durable file or directory; what was fetched before and has not changed is not copied again.

        Files that the stage's record lists are compared with their digests there.
        Raises: FileNotFoundError: there is nothing durable at `relpath`. DamagedError: a file is not as it was written.
        """
        target = self._fetch(relpath)
        self._check(relpath)
        return target

    def _fetch(self, relpath: str) -> Path:
        target = self.local / relpath
        if isinstance(self.storage, LocalStorage):
            if not target.exists():
                raise FileNotFoundError(f"There is nothing at {target}.")
            return target
        remote = self.storage.files_under(self._key(relpath))
        if not remote:
            raise FileNotFoundError(f"There is nothing at {self.storage.url_of(self._key(relpath))}.")
        known = self._fetched()
        for relative, version in remote.items():
            name = "/".join(part for part in (relpath, relative) if part)
            path = self.local / name
            if path.is_file() and known.get(name) == [version, _local_mark(path)]:
                continue
            self.storage.get_file(self._key(name), path)
            known[name] = [version, _local_mark(path)]
        LocalStorage(self.local).write_json_atomic(_FETCHED, known)
        return target

    def publish_exactly(self, relpath: str) -> None:
        """As publish, of a directory; what is durable in it and no longer there locally is removed."""
        self.publish(relpath)
        if not isinstance(self.storage, LocalStorage):
            local = {name for _, name in files_below(self.local / relpath)}
            for name in self.storage.files_under(self._key(relpath)):
                if name not in local:
                    self.delete(f"{relpath}/{name}")

    def restore(self, relpath: str) -> Path:
        """The local directory `relpath` as it was last published, empty if it never was.

        On file storage it is as it was left, published or not.
        """
        target = self.local / relpath
        if not isinstance(self.storage, LocalStorage):
            LocalStorage(self.local).delete(relpath)
            if self.exists(relpath):
                self._fetch(relpath)
        target.mkdir(parents=True, exist_ok=True)
        return target

    def describe_files(self) -> dict[str, FileEntry]:
        """Size and SHA-256 of every file that is not vouched for by another one: for the record of a finished stage."""
        names = [name for name in self.storage.files_under(self.relpath) if not _VOUCHED_FOR.search(name)]
        entries = {}
        for name in sorted(names):
            path = self._fetch(name)
            with open(path, "rb") as file:
                entries[name] = FileEntry(
                    size_bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
                )
        return entries

    def _check(self, relpath: str) -> None:
        try:
            files: dict[str, dict[str, Any]] = self.read_json(RECORD).get("files", {})
        except FileNotFoundError:
            return  # the stage is running; its checkpoints and slices have digests of their own
        wanted = relpath.strip("/")
        for name, entry in files.items():
            if not wanted or name == wanted or name.startswith(f"{wanted}/"):
                try:
                    check_file(self.local / name, **entry)
                except DamagedError as error:
                    raise DamagedError(f"{error}. {self.remedy}") from error

    def exists(self, relpath: str = "") -> bool:
        """Whether `relpath` is there durably."""
        return self.storage.exists(self._key(relpath))

    def listdir(self, relpath: str = "") -> list[str]:
        """Sorted names of what is durable directly under `relpath`; empty where there is nothing."""
        return self.storage.list(self._key(relpath))

    def delete(self, relpath: str = "") -> None:
        """Remove `relpath` (a file, a directory, or by default everything), durable and local."""
        self.storage.delete(self._key(relpath))
        if not isinstance(self.storage, LocalStorage):
            LocalStorage(self.local.parent).delete("/".join(part for part in (self.local.name, relpath) if part))

    def write_json(self, relpath: str, value: Mapping[str, Any]) -> None:
        """Write a durable JSON file in one step."""
        self.storage.write_json_atomic(self._key(relpath), value)
        if not isinstance(self.storage, LocalStorage):
            LocalStorage(self.local).write_json_atomic(relpath, value)

    def write_bytes(self, relpath: str, data: bytes) -> None:
        """Write a durable file in one step."""
        self.storage.write_bytes_atomic(self._key(relpath), data)
        if not isinstance(self.storage, LocalStorage):
            LocalStorage(self.local).write_bytes_atomic(relpath, data)

    def read_bytes(self, relpath: str) -> bytes:
        """The whole of a durable file. Raises FileNotFoundError."""
        return self.storage.read_bytes(self._key(relpath))

    def create_json(self, relpath: str, value: Any) -> bool:
        """As write_json, unless the file exists. Of several callers at once exactly one gets True."""
        created = self.storage.create_exclusive(self._key(relpath), encode_json(value))
        if created and not isinstance(self.storage, LocalStorage):
            LocalStorage(self.local).write_json_atomic(relpath, value)
        return created

    def read_json(self, relpath: str) -> Any:
        """The value of a durable JSON file. Raises FileNotFoundError; DamagedError."""
        return self.storage.read_json(self._key(relpath))

    def _key(self, relpath: str) -> str:
        return "/".join(part for part in (self.relpath, relpath.strip("/")) if part)

    def _fetched(self) -> dict[str, list[str]]:
        try:
            known: dict[str, list[str]] = LocalStorage(self.local).read_json(_FETCHED)
        except (FileNotFoundError, DamagedError):  # what it says is found out again
            return {}
        return known


def _local_mark(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"
