"""Storage in a local directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from base import files
from base.errors import UserError
from data.paths import expanded
from pipelines.faults import Fault, Judgement
from pipelines.storage.storage import RETRY_S, Storage


class LocalStorage(Storage):
    """A directory of this machine, or one that is mounted here."""

    _check_first = "the disk"
    _client_retries = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises: UserError: the path names the home of a user that does not exist."""
        super().__init__(os.path.abspath(expanded(os.fspath(path), "storage")))

    def path(self, relpath: str = "") -> Path:
        """`relpath` as a path of this machine."""
        return Path(self.url_of(relpath))

    def _read(self, relpath: str) -> bytes:
        return self.path(relpath).read_bytes()

    def _exists(self, relpath: str) -> bool:
        return _exists(self.path(relpath))

    def _names(self, relpath: str) -> list[str]:
        return os.listdir(self.path(relpath))

    def _write(self, relpath: str, data: bytes) -> None:
        files.replace(self.path(relpath), data)

    def _create(self, relpath: str, data: bytes) -> None:
        files.create(self.path(relpath), data)

    def _delete(self, relpath: str) -> None:
        path = self.path(relpath)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _put(self, local: Path, relpath: str) -> None:
        files.copy(local, self.path(relpath))

    def _get(self, relpath: str, local: Path) -> None:
        shutil.copyfile(self.path(relpath), local)

    def _versions(self, relpath: str) -> dict[str, str]:
        root = self.path(relpath)
        stats = {relative: path.stat() for path, relative in files.files_below(root)} if _exists(root) else {}
        return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in stats.items()}

    def _usage(self, relpath: str) -> files.Usage:
        return files.usage(self.path(relpath))

    def _is_missing(self, action: str, error: Exception) -> bool:
        if isinstance(error, NotADirectoryError):
            return action != "write" and self.path().is_dir()
        return isinstance(error, FileNotFoundError)

    def _says_exists(self, error: Exception, relpath: str) -> bool:
        return isinstance(error, FileExistsError) and self.path(relpath).exists()

    def _users_error(self, cannot: str, judgement: Judgement, relpath: str) -> UserError | None:
        error = judgement.error
        if judgement.fault is not Fault.USER or not isinstance(error, NotADirectoryError | FileExistsError):
            return None
        return UserError(
            f"Cannot write below {self.url_of(relpath)}: {error.filename or self.url} is a file, or is below one. Set "
            "`storage` to a directory, or to a place where one can be made."
        )

    def _note_answer(self) -> None:
        pass

    def _usual_patience_s(self) -> float:
        return RETRY_S


def _exists(path: Path) -> bool:
    """As Path.exists, but an error of the disk is not taken for absence."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True
