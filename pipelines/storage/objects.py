"""Storage in an object store, through fsspec: S3, Google Cloud Storage, Azure and whatever else it speaks."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from base.errors import UserError
from base.files import Usage, is_temporary
from pipelines.faults import CREDENTIAL_TYPES, Fault, Judgement, judge
from pipelines.storage.storage import RETRY_S, Storage, brief

FIRST_RETRY_S = 20.0  # patience of a process that the store has never answered: the address may be wrong
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
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}

_answered: set[str] = set()  # stores that this process has had an answer from


class ObjectStorage(Storage):
    """A prefix of a bucket. One put is atomic there, so a file needs no temporary name."""

    _check_first = "the network, the store, and its address and settings here"
    _client_retries = True  # HTTP clients repeat calls in silence

    def __init__(self, url: str) -> None:
        """Raises: UserError: the scheme is unknown, or the package for it is not installed."""
        super().__init__(url.rstrip("/"))
        self._scheme = url.partition("://")[0]
        _check_driver(self._scheme, url)

    def _read(self, relpath: str) -> bytes:
        return bytes(self._fs().cat_file(self._key(relpath)))

    def _exists(self, relpath: str) -> bool:
        return bool(self._fs().exists(self._key(relpath)))

    def _names(self, relpath: str) -> list[str]:
        key = self._key(relpath)
        found = self._fs().ls(key, detail=False, refresh=True)
        return [PurePosixPath(path).name for path in found if path.strip("/") != key.strip("/")]

    def _write(self, relpath: str, data: bytes) -> None:
        self._fs().pipe_file(self._key(relpath), data)

    def _create(self, relpath: str, data: bytes) -> None:
        self._fs().pipe_file(self._key(relpath), data, mode="create")

    def _delete(self, relpath: str) -> None:
        fs, key = self._fs(), self._key(relpath)
        if fs.exists(key):
            fs.rm(key, recursive=True)

    def _put(self, local: Path, relpath: str) -> None:
        self._fs(large=True).put_file(str(local), self._key(relpath))

    def _get(self, relpath: str, local: Path) -> None:
        self._fs().get_file(self._key(relpath), str(local))

    def _versions(self, relpath: str) -> dict[str, str]:
        fs, key = self._fs(), self._key(relpath)
        fs.invalidate_cache(key)
        found = fs.find(key, detail=True)
        return {
            path[len(key) :].lstrip("/"): str(info.get("ETag") or info.get("etag") or info.get("mtime") or info["size"])
            for path, info in sorted(found.items())
            if not is_temporary(PurePosixPath(path).name)
        }

    def _usage(self, relpath: str) -> Usage:
        fs, key = self._fs(), self._key(relpath)
        fs.invalidate_cache(key)
        found = list(fs.find(key, detail=True).values())
        times = [changed for changed in map(_changed_at, found) if changed is not None]
        return Usage(len(found), sum(int(info.get("size") or 0) for info in found), max(times, default=None))

    def _is_missing(self, action: str, error: Exception) -> bool:
        if not isinstance(error, FileNotFoundError):
            return False
        return "bucket does not exist" not in str(error) and judge(error).code not in _NO_BUCKET

    def _says_exists(self, error: Exception, relpath: str) -> bool:
        text = str(error)
        return isinstance(error, FileExistsError) or "PreconditionFailed" in text or "pre-conditions" in text

    def _users_error(self, cannot: str, judgement: Judgement, relpath: str) -> UserError | None:
        if isinstance(judgement.error, FileNotFoundError) or judgement.code in _NO_BUCKET:
            return UserError(f"{cannot}: the bucket does not exist. Create it, or set `storage` to one that does.")
        if judgement.fault is Fault.USER and judgement.code in CREDENTIAL_TYPES:
            return UserError(
                f"{cannot}: no valid credentials were found ({brief(judgement)}). Set them the way the store's own "
                "tools read them (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
            )
        return None

    def _note_answer(self) -> None:
        _answered.add(self.url)

    def _usual_patience_s(self) -> float:
        return RETRY_S if self.url in _answered else FIRST_RETRY_S

    def _fs(self, large: bool = False) -> Any:
        """The client. Args: large: for files of many parts, of which the client repeats one, not we all of them."""
        once = {} if large else _TRY_ONCE.get(self._scheme, {})
        fs = fsspec.filesystem(self._scheme, use_listings_cache=False, **once)
        if once:
            fs.retries = 1
        return fs

    def _key(self, relpath: str) -> str:
        return str(self._fs()._strip_protocol(self.url_of(relpath)))


def _changed_at(info: dict[str, Any]) -> float | None:
    """Seconds since the epoch: S3, Azure and GCS each have a name of their own for it."""
    changed = info.get("LastModified") or info.get("last_modified") or info.get("updated") or info.get("mtime")
    if isinstance(changed, str):
        changed = datetime.fromisoformat(changed)
    return changed.timestamp() if isinstance(changed, datetime) else changed


def _check_driver(scheme: str, url: str) -> None:
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
