"""What every storage can do: a root URL and operations on paths relative to it.

Every write is all-or-nothing, and every call is repeated while its error may pass. The kinds of storage
(local.py, objects.py) say how one file is read, written and created, and what their errors mean.
"""

from __future__ import annotations

import copy
import errno
import logging
import math
import os
import random
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from base.errors import DamagedError, UserError
from base.files import Usage, files_below, in_one_step, is_temporary
from base.sealed import dumps, seal, unseal
from pipelines.errors import InfrastructureError
from pipelines.faults import Fault, Judgement, judge

RETRY_S = 60.0  # how long a call is repeated
_PAUSE_S = (0.25, 8.0)  # before the second try, and at most
_NO_ROOM = {errno.EDQUOT: "the disk quota is used up"}

Result = TypeVar("Result")
Names = list[str]  # inside the class, `list` is a method

log = logging.getLogger(__name__)


class Storage(ABC):
    """Files below a root URL; paths are relative to it (POSIX, no leading slash, never leaving the root).

    Instances are small and picklable: a connection is made on first use in each process.

    Calls that fail by a fault that may pass (503, a lost connection, a disk error) are repeated with growing, random
    pauses for RETRY_S. What fails in the end is a UserError (rights, names, credentials) or an InfrastructureError
    (unreachable, full); a file that is not there is a FileNotFoundError.
    """

    url: str
    _check_first: str  # what to look at when the storage does not answer

    def __init__(self, url: str) -> None:
        self.url = url
        self.retry_s = math.inf  # no limit of the caller's

    def with_retry_s(self, retry_s: float) -> Storage:
        """The same storage for a caller with no more patience than this, such as a lease that must act in time."""
        other = copy.copy(self)
        other.retry_s = retry_s
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def url_of(self, relpath: str = "") -> str:
        """The absolute path (local) or URL of `relpath`."""
        relpath = checked(relpath)
        return f"{self.url}/{relpath}" if relpath else self.url

    # ---- one file or directory

    def read_bytes(self, relpath: str) -> bytes:
        """The whole of one file. Raises FileNotFoundError if there is none."""
        return self._call("read", relpath, lambda: self._read(relpath))

    def read_json(self, relpath: str) -> Any:
        """The object in a file of write_json_atomic. Raises FileNotFoundError; DamagedError: it is not as written."""
        try:
            return unseal(self.read_bytes(relpath), self.url_of(relpath))
        except DamagedError as error:
            raise DamagedError(f"{error}. Restore it, or delete it to have what it describes made again.") from error

    def exists(self, relpath: str = "") -> bool:
        """Whether there is a file, or a directory with something in it, at `relpath`."""
        return self._call("read", relpath, lambda: self._exists(relpath), missing=False)

    def list(self, relpath: str = "") -> list[str]:
        """Sorted names directly under `relpath`; empty if there is nothing. Unfinished writes are not shown."""
        names = self._call("list", relpath, lambda: self._names(relpath), missing=Names())
        return sorted(name for name in names if not is_temporary(name))

    def unfinished(self, relpath: str = "") -> Names:
        """Sorted names directly under `relpath` of unfinished writes: of processes that write now, or were stopped."""
        return sorted(filter(is_temporary, self._call("list", relpath, lambda: self._names(relpath), missing=Names())))

    def write_bytes_atomic(self, relpath: str, data: bytes) -> None:
        """Replace the file in one step: a reader, or a crash, sees the old content or the new, never a part."""
        self._call("write", relpath, lambda: self._write(relpath, data))

    def write_json_atomic(self, relpath: str, value: Mapping[str, Any]) -> None:
        """As write_bytes_atomic, of an object as indented JSON with its digest in it (base.sealed)."""
        self.write_bytes_atomic(relpath, encode_json(value))

    def create_exclusive(self, relpath: str, data: bytes) -> bool:
        """Create the file with all its content unless it exists. Of several callers at once exactly one gets True.

        A try whose answer got lost may have created the file. The content then tells whose it is, so `data` must name
        its writer. On stores without conditional puts (not S3, GCS or Azure) the existence check and the put are two
        steps; callers that need certainty read the file again.
        """
        failed_before = False

        def create() -> bool:
            nonlocal failed_before
            try:
                self._create(relpath, data)
            except Exception as error:
                if self._says_exists(error, relpath):
                    return (failed_before or self._client_retries) and self.read_bytes(relpath) == data
                failed_before = True
                raise
            return True

        return self._call("write", relpath, create)

    def delete(self, relpath: str) -> None:
        """Remove a file or a whole directory; nothing happens if there is none. The root itself is refused."""
        if not checked(relpath):
            raise ValueError(f"Refusing to delete the whole storage {self.url}.")
        self._call("delete", relpath, lambda: self._delete(relpath), missing=None)

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
        for path, relative in files_below(local):
            target = _joined(relpath, relative)
            self._call("write", target, partial(self._put, path, target))

    def get_tree(self, relpath: str, local: Path) -> None:
        """Copy a file or directory from here to `local`. Raises FileNotFoundError if there is nothing."""
        files = self.files_under(relpath)
        if not files:
            raise FileNotFoundError(f"There is nothing at {self.url_of(relpath)}.")
        for relative in files:
            self.get_file(_joined(relpath, relative), local / relative if relative else local)

    def get_file(self, relpath: str, local: Path) -> None:
        """Copy one file from here to `local` in one step."""
        self._call("read", relpath, lambda: in_one_step(local, lambda temporary: self._get(relpath, temporary)))

    def files_under(self, relpath: str = "") -> dict[str, str]:
        """Every file below `relpath`, by path relative to it ("" when `relpath` is itself a file), with a version mark.

        The mark changes when the content is replaced (size and time of a local file, the entity tag of an object).
        """
        return self._call("list", relpath, lambda: self._versions(relpath), missing={})

    def usage(self, relpath: str = "") -> Usage:
        """Room that a file, or everything below a directory, takes; unfinished writes are counted too."""
        return self._call("list", relpath, lambda: self._usage(relpath), missing=Usage(0, 0, None))

    # ---- what a kind of storage provides; errors as they come

    _client_retries: bool  # whether a call can be repeated below us, so that a creation may meet its own file

    @abstractmethod
    def _read(self, relpath: str) -> bytes: ...

    @abstractmethod
    def _exists(self, relpath: str) -> bool: ...

    @abstractmethod
    def _names(self, relpath: str) -> Names: ...

    @abstractmethod
    def _write(self, relpath: str, data: bytes) -> None: ...

    @abstractmethod
    def _create(self, relpath: str, data: bytes) -> None: ...

    @abstractmethod
    def _delete(self, relpath: str) -> None: ...

    @abstractmethod
    def _put(self, local: Path, relpath: str) -> None: ...

    @abstractmethod
    def _get(self, relpath: str, local: Path) -> None: ...

    @abstractmethod
    def _versions(self, relpath: str) -> dict[str, str]: ...

    @abstractmethod
    def _usage(self, relpath: str) -> Usage: ...

    @abstractmethod
    def _is_missing(self, action: str, error: Exception) -> bool:
        """Whether the file is not there, in a storage that is."""

    @abstractmethod
    def _says_exists(self, error: Exception, relpath: str) -> bool:
        """Whether a creation failed because the file itself exists (and not, say, a file in place of its directory)."""

    @abstractmethod
    def _users_error(self, cannot: str, judgement: Judgement, relpath: str) -> UserError | None:
        """The user's error behind an error, if only this kind of storage has it. Args: cannot: how messages start."""

    @abstractmethod
    def _note_answer(self) -> None:
        """The storage has answered: more patience with it from now on."""

    @abstractmethod
    def _usual_patience_s(self) -> float: ...

    # ---- patience and errors

    def _call(self, action: str, relpath: str, function: Callable[[], Result], **missing: Result) -> Result:
        """Call `function`, again and again while its errors may pass.

        Args: missing: `missing=VALUE` is the result if there is no such file; otherwise FileNotFoundError is raised.
        """
        started = time.monotonic()
        pause_s, warned = _PAUSE_S[0], False
        while True:
            try:
                result = function()
            except (UserError, InfrastructureError):
                raise
            except Exception as error:
                if self._is_missing(action, error):
                    self._note_answer()
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
                if not warned:
                    log.warning("Cannot %s %s now (%s); trying again.", action, self.url_of(relpath), brief(judgement))
                    warned = True
                time.sleep(wait_s)
            else:
                self._note_answer()
                return result

    def _patience_s(self) -> float:
        configured = os.environ.get("BMOJO_STORAGE_RETRY_S")
        return min(self.retry_s, float(configured) if configured else self._usual_patience_s())

    def _explained(
        self, action: str, relpath: str, judgement: Judgement, waited_s: float
    ) -> UserError | InfrastructureError | None:
        """The error of ours that says what happened and what to do; None for a bug."""
        cannot, error = f"Cannot {action} {self.url_of(relpath)}", judgement.error
        users = self._users_error(cannot, judgement, relpath)
        if users is not None:
            return users
        if isinstance(error, OSError) and error.filename and error.filename != self.url_of(relpath):
            cannot += f" ({error.filename})"  # a temporary file, or the local end of a copy
        match judgement.fault:
            case Fault.FULL:
                full = _NO_ROOM.get(getattr(error, "errno", None) or 0, "no space is left")
                return InfrastructureError(
                    f"{cannot}: {full} ({brief(judgement)}). Make room, then the same command resumes: finished work "
                    "is kept."
                )
            case Fault.TRANSIENT:
                tried = f" after {waited_s:.0f} s of trying" if waited_s >= 1 else ""
                return InfrastructureError(
                    f"{cannot}: {brief(judgement)}{tried}. Check {self._check_first}; then the same command resumes: "
                    "finished work is kept."
                )
            case Fault.BUG:
                return None
            case Fault.USER:
                return UserError(
                    f"{cannot}: it is not allowed or not possible ({brief(judgement)}). Fix that or set `storage` to "
                    "another place, then run the same command again: finished work is kept."
                )


def checked(relpath: str) -> str:
    """`relpath` in its shortest form. Raises ValueError if it leaves the storage."""
    path = PurePosixPath(relpath)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{relpath!r} is not a path inside the storage.")
    return "" if str(path) == "." else str(path)


def encode_json(value: Mapping[str, Any]) -> bytes:
    """The object as a file of ours holds it: indented JSON with its digest in it."""
    return (dumps(seal(value), indent=2) + "\n").encode()


def brief(judgement: Judgement) -> str:
    """What happened, in one short line."""
    error = judgement.error
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or "no message"
    return f"{judgement.code}: {' '.join(text.split())[:300]}" if judgement.code not in text else text[:300]


def _joined(relpath: str, relative: str) -> str:
    return str(PurePosixPath(relpath) / relative) if relative else relpath
