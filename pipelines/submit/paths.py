"""Paths of a pipeline that a job must find again on the cluster: its storage, its text, its code."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from data.paths import expanded
from pipelines.engine.stage import AnyNode
from pipelines.storage import LocalStorage, open_storage


@dataclass(frozen=True)
class Inputs:
    """What the stages read of this machine."""

    shipped: tuple[Path, ...]  # files, absolute
    notes: tuple[str, ...]  # what the cluster must see by itself


def find_inputs(graph: Iterable[AnyNode], is_here: bool) -> Inputs:
    """The files that the pipeline names by relative paths, and its code: they are shipped. Others are noted.

    Args: is_here: whether all of the cluster is on this machine.

    Raises: UserError: there is no such file, or a module of the user's is missing or invalid.
    """
    shipped: dict[Path, None] = {}
    absolute: dict[str, str] = {}  # path -> a stage that reads it
    for node in graph:
        shipped |= dict.fromkeys(node.stage.code_files(node.config))
        for path in node.stage.local_paths(node.config):
            if expanded(path).is_absolute():
                absolute.setdefault(path, node.name)
            else:
                shipped |= dict.fromkeys(_files_at(path, node.name))
    notes = [
        f"stage {name}: {path} is an absolute path. All machines of the cluster must see it there; a relative path "
        "would be shipped."
        for path, name in absolute.items()
    ]
    return Inputs(tuple(shipped), () if is_here else tuple(notes))


def find_storage(storage: str, is_here: bool) -> tuple[str, str | None]:
    """The storage as the job must name it, and a note on it, if it needs one.

    Raises: UserError: it is a relative path, which would be a folder of the job's own on the cluster.
    """
    opened = open_storage(storage)
    if not isinstance(opened, LocalStorage):
        return storage, None
    if is_here:
        return opened.url, None
    if not expanded(storage.partition("://")[2] or storage).is_absolute():
        raise UserError(
            f"storage={storage} is a relative path, and the cluster is not on this machine: the job's folder is gone "
            "when it ends. Name an object store (storage=s3://bucket/prefix), or by an absolute path a folder that all "
            "machines of the cluster share."
        )
    return opened.url, (
        f"storage={opened.url} is a path: all machines of the cluster must share that folder, and this one, to watch "
        "the run from here. Else name an object store."
    )


def common_base(paths: Sequence[Path]) -> Path:
    """The folder below which all of these are."""
    return Path(os.path.commonpath(paths))


def _files_at(path: str, stage: str) -> Iterator[Path]:
    named = Path(os.path.normpath(Path.cwd() / expanded(path)))
    matches = [named] if named.exists() else [Path(match) for match in sorted(glob.glob(str(named), recursive=True))]
    files = [
        file
        for match in matches
        for file in (sorted(match.rglob("*")) if match.is_dir() else [match])
        if file.is_file()
    ]
    if not files:
        raise UserError(f"stage {stage}: there is no file {path} (from {Path.cwd()}). Correct the path.")
    yield from files
