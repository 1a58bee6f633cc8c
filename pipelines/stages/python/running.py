"""The running stage, as the user's function sees it."""

from __future__ import annotations

import logging
import operator
import posixpath
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipelines.engine.stage import StageConfig, StageOutput
from pipelines.storage.artifact import ArtifactDir

FILES_FOLDER = "files"  # in the artifact: what the function leaves in its folder
PROGRESS_TOTAL = "python/total"
_NAME = re.compile(r"[\w.\- :/]{1,250}", re.ASCII)  # what MLflow takes
_PROGRESS_EVERY_S = 1.0
_FLUSH_EVERY_S = 10.0


@dataclass(frozen=True)
class Input:
    """A finished stage that yours reads."""

    name: str  # in the pipeline file
    kind: str
    config: StageConfig  # its settings, with the types of its kind
    output: StageOutput  # the facts in its record, with the types of its kind
    fingerprint: str
    artifact: ArtifactDir

    @cached_property
    def path(self) -> Path:
        """A local folder with all its files, compared with their digests. Raises DamagedError.

        Of a `python` stage it is what its function left in `folder`.
        """
        return self.artifact.fetch(self._root)

    def fetch(self, relpath: str) -> Path:
        """One of its files or folders, without the others. Raises FileNotFoundError: there is none; DamagedError."""
        return self.artifact.fetch(posixpath.join(self._root, relpath) if self._root else relpath)

    @property
    def _root(self) -> str:
        return FILES_FOLDER if self.kind == "python" else ""


class PointJournal(Protocol):
    """Where a stage's points go."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def flush(self) -> bool: ...


class RunningStage:
    """What your function is called with.

    The function may be called again: after a crash it finds `folder` as it was, and should go on from there. In an
    object store (s3://, gs://) that is the folder as of the last `save()`.

    Without arguments but `folder` it is a stage for your own tests: points go nowhere.
    """

    def __init__(
        self,
        folder: Path,
        args: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Input] | None = None,
        gathered: Mapping[str, tuple[Input, ...]] | None = None,
        *,
        name: str = "stage",
        log: logging.Logger | None = None,
        journal: PointJournal | None = None,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        """Its name in the pipeline file."""
        self.folder = folder
        """Its files: what lies in here when the function returns becomes part of the stage's result."""
        self.args: dict[str, Any] = dict(args or {})
        """The `args` of the pipeline file."""
        self.inputs: Mapping[str, Input] = inputs or {}
        """The stages in `needs` by the names given there: `[tokens]` and `{tokens: tokens}` are inputs["tokens"]."""
        self.gathered: Mapping[str, tuple[Input, ...]] = gathered or {}
        """Lists of stages in `needs`: `{models: [a, b]}` is gathered["models"]."""
        self.log = log or logging.getLogger(f"bmojo.stage.{name}")
        """Writes to log.txt beside the folder, from level INFO on."""
        self.last_step = 0
        """The highest step of a metric so far."""
        self._journal, self._publish = journal, publish
        self._flushed_at = time.monotonic()
        self._progress_at = -_PROGRESS_EVERY_S

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record points of curves, shown live in MLflow and on the console.

        A point that an earlier call recorded for the same name and step is left out.
        Raises: ValueError, TypeError: a step, a name or a value is not one.
        """
        step = operator.index(step)
        numbers = {checked_name(name): _number(name, value) for name, value in values.items()}
        self.last_step = max(self.last_step, step)
        if self._journal is None:
            return
        self._journal.log_metrics(step, numbers)
        if time.monotonic() - self._flushed_at > _FLUSH_EVERY_S:
            self._flushed_at = time.monotonic()
            self._journal.flush()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record facts that are known before the work, such as a size. The first value of a name stays."""
        plain = {
            checked_name(name): value if isinstance(value, str | int | float) else str(value)
            for name, value in params.items()
        }
        if self._journal is not None:
            self._journal.log_params(plain)

    def progress(self, done: int, total: int) -> None:
        """Say how far the work is; call it as often as you like. `done` counts as the steps of log_metrics do."""
        if done >= total or time.monotonic() - self._progress_at >= _PROGRESS_EVERY_S:
            self._progress_at = time.monotonic()
            self.log_metrics(done, {PROGRESS_TOTAL: total})

    def save(self) -> None:
        """Make what is in `folder`, and the points so far, safe from a crash of the machine."""
        if self._journal is not None:
            self._journal.flush()
        self._publish()


def checked_name(name: object) -> str:
    """The name of a figure, if trackers take it. Raises ValueError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or posixpath.normpath(name) != name or name[0] in "/.":
        raise ValueError(
            f"found the name {name!r}, expected letters, digits, spaces and any of _ - . : /, such as coverage/train."
        )
    return name


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected a number.") from None
