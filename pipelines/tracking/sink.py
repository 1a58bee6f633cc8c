"""What the journal's replay and the commands know of a place that shows runs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import AfterValidator, Field

from base.config import StrictConfig
from pipelines.storage import LocalStorage, Storage
from pipelines.tracking.trouble import Cause, Trouble, brief, trouble_of

Event = dict[str, Any]
"""A line of a journal: its time `t` in milliseconds since the epoch, its type `event`, and the fields of that type."""


class UnsendableError(ValueError):
    """A journal event that its sink will never take. Its cause, if it has one, is what the sink raised."""


class Sink(Protocol):
    """One pipeline run in one place that shows runs. Not for several threads.

    Every call may be repeated, also by another process after a crash: what has arrived already changes nothing.
    Target.diagnose explains what the methods raise.
    """

    def open_run(self, stage: str | None, time_ms: int) -> str:
        """The sink's id of the run of a stage, or of the pipeline run (None). A new one starts at `time_ms`."""

    def has_run(self, run: str) -> bool:
        """Whether a run is still there: users delete runs."""

    def send(self, run: str, events: Sequence[Event], artifact_url: str | None) -> None:
        """Deliver a number of `metrics` events, or one event of another type.

        Args: artifact_url: the directory of the stage's files, whose paths in events are relative to it.
        Raises: UnsendableError: an event among them is at fault, not the sink.
        """


class Target(ABC):
    """Where runs are shown, known without connecting to it."""

    name: ClassVar[str]  # of the program that shows them
    package: ClassVar[str]  # that `open` imports
    notice: str | None = None  # what the user should know about the choice

    @property
    @abstractmethod
    def where(self) -> str:
        """Name and place for messages, without credentials."""

    @abstractmethod
    def open(self, run_id: str) -> Sink:
        """Connect, for the runs of one pipeline run.

        Raises: UserError: the place refuses until the user changes something. ImportError: `package` is missing.
        """

    @property
    def identity(self) -> str:
        """The same text for the same place, whatever process asks."""
        return self.where

    @property
    def key(self) -> str:
        """Short name for files that belong to this target."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:12]

    def answers(self) -> bool:
        """Whether `open` is worth a try, found out without importing anything."""
        return True

    def viewer(self) -> str | None:
        """The command that shows a local store, if there is one and `bmojo ui` does not serve it."""
        return None

    def link(self, run: str | None, storage: Storage) -> str | None:
        """The page that shows a run, or the command that does; None if there is neither.

        Args: run: the sink's id of it, None if that is not known. storage: where the run is kept.
        """
        return self.viewer()

    def diagnose(self, error: Exception) -> Trouble:
        """Judge what `open` or a method of its sink raised."""
        found = trouble_of(error, self.where) or self._explain(error)
        return found or Trouble(Cause.AWAY, f"{self.where} cannot be reached ({brief(error)}).")

    def _explain(self, error: Exception) -> Trouble | None:
        """What only this kind of target knows about an error."""
        return None


class SinkConfig(StrictConfig):
    """One tracker of a pipeline file. `kind` is narrowed to a Literal by each subclass."""

    target_type: ClassVar[type[Target]]

    kind: str = Field(description="Program that shows the runs.")
    system_metrics: bool = Field(
        True, description="Log CPU, memory and disk use of the driver's machine. In a list, any tracker's true counts."
    )

    def target(self, storage: Storage) -> Target:
        """Where the runs of a storage are shown. Raises ConfigError: no such place can exist."""
        raise NotImplementedError


def _absolute(folder: str) -> str:
    if "://" in folder:
        raise ValueError(f"found {folder!r}, expected a folder of this machine.")
    return str(Path(folder).expanduser().absolute())


LocalFolder = Annotated[str, AfterValidator(_absolute)]
"""The type of a setting that names a folder of this machine: `bmojo sync` finds it from any other folder."""


def local_folder(storage: Storage, name: str) -> Path:
    """A folder for a sink's own files: under the storage, or under ./.bmojo of this machine if that is far away."""
    return storage.path(name) if isinstance(storage, LocalStorage) else Path(".bmojo").resolve() / name
