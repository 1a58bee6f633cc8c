"""What a job gets to see of this machine: one archive with our packages and the user's files.

Our packages lie at its top, so that no folder of the user's (`data/` is a common name) hides one of them. The user's
files lie below JOB_FOLDER as they lie here, seen from the current directory, so relative paths mean the same.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from pipelines.packages import PACKAGES, PRESETS_DIR, REPOSITORY
from pipelines.submit.environment import FILE

JOB_FOLDER = "job"
MAX_BYTES = 100 * 2**20  # of a body that Ray's dashboard takes (DASHBOARD_CLIENT_MAX_SIZE)
MAX_FILES = 20_000
BIG_BYTES = 10 * 2**20

_LEFT_OUT = {"__pycache__", "venv", "node_modules", "mlruns"}  # and all that is hidden: .git, .venv, .env, caches
_LEFT_OUT_AT_TOP = {"data", "runs"}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # one time for all: the same files are the same archive, which Ray keeps
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Contents:
    """The user's files, as chosen from a folder."""

    files: tuple[Path, ...]  # absolute
    left_out: tuple[str, ...]  # what a user may miss: folders, and files with their sizes


def choose_files(folder: Path, needed: Iterable[Path], storage: Path | None) -> Contents:
    """The files of `folder` that are shipped: all but hidden ones, caches, data, runs, and big ones.

    Args: folder, needed, storage: absolute. needed: shipped in any case, wherever they are. storage: left out.

    Raises: UserError: there are too many, or a folder cannot be read.
    """
    files = dict.fromkeys(needed)
    left_out: list[str] = []
    for path, size in _walk(folder, storage, left_out):
        if size > BIG_BYTES and path not in files:
            left_out.append(f"{path.relative_to(folder)} ({_megabytes(size)})")
            continue
        files[path] = None
        if len(files) > MAX_FILES:
            raise UserError(
                f"{folder}: more than {MAX_FILES:,} files would be shipped to the cluster. Put the pipeline file into "
                "a folder of its own, or name a smaller one with --working-dir."
            )
    return Contents(tuple(files), tuple(left_out))


def write_package(target: Path, contents: Contents, base: Path, environment: bytes | None) -> None:
    """Write the archive.

    Args: base: the directory that JOB_FOLDER stands for; above all files. environment: see environment.py.

    Raises: UserError: it is larger than Ray takes; names the largest files. Or a file cannot be read.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        if environment is not None:
            _add(archive, FILE, environment, 0o600)
        for path in _own_files():
            _add(archive, path.relative_to(REPOSITORY).as_posix(), _read(path), 0o644)
        for path in contents.files:
            mode = 0o755 if os.access(path, os.X_OK) else 0o644
            _add(archive, f"{JOB_FOLDER}/{path.relative_to(base).as_posix()}", _read(path), mode)
            if target.stat().st_size > MAX_BYTES:
                raise _too_large(contents)
    if target.stat().st_size > MAX_BYTES:
        raise _too_large(contents)


def _walk(folder: Path, storage: Path | None, left_out: list[str]) -> Iterator[tuple[Path, int]]:
    """Files with their sizes, in order; notes folders of the user's that are left out."""

    def failed(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}. Allow reading it, or move it away.") from error

    for where, folders, names in os.walk(folder, onerror=failed):
        here = Path(where)
        kept = []
        for name in sorted(folders):
            path = here / name
            if name.startswith(".") or name in _LEFT_OUT or (path / "pyvenv.cfg").exists():
                continue
            if path == storage or path.is_symlink() or (here == folder and name in _LEFT_OUT_AT_TOP):
                left_out.append(f"{path.relative_to(folder)}/")
                continue
            kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            path = here / name
            if not name.startswith(".") and path.is_file():
                yield path, path.stat().st_size


def _own_files() -> Iterator[Path]:
    for folder in (*(REPOSITORY / package for package in PACKAGES), PRESETS_DIR):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _add(archive: zipfile.ZipFile, name: str, data: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = (0o100000 | mode) << 16
    archive.writestr(entry, data, zipfile.ZIP_DEFLATED)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}. It cannot be shipped: allow reading it, or move it away."
        ) from error


def _too_large(contents: Contents) -> UserError:
    sizes = sorted(((path.stat().st_size, str(path)) for path in contents.files), reverse=True)[:_NUM_SHOWN]
    shown = ", ".join(f"{path} ({_megabytes(size)})" for size, path in sizes)
    return UserError(
        f"The {len(contents.files):,} files to be shipped are more than the {MAX_BYTES // 2**20} MiB that Ray's "
        f"dashboard takes, compressed. The largest: {shown}. Put large files where all machines of the cluster see "
        "them and name them by absolute paths, or name a smaller folder with --working-dir."
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
