"""TensorBoard as a sink: a folder of event files per run and stage, with its points and configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipelines.faults import explained_disk
from pipelines.storage import Storage
from pipelines.tracking.journal import StepSet
from pipelines.tracking.sink import Event, LocalFolder, SinkConfig, Target, UnsendableError, local_folder


class TensorboardSink:
    """A pipeline run as a folder of TensorBoard's: a Sink. What its files hold already is not written again."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._open_writer, self._open_reader = folder, SummaryWriter, LegacyEventFileLoader
        self._writers: dict[str, Any] = {}
        self._readers: dict[Path, Any] = {}
        self._held: dict[tuple[str, str], tuple[StepSet, float]] = {}  # by run and tag: steps, latest time
        self.open_run(None, 0)

    def open_run(self, stage: str | None, time_ms: int) -> str:
        with explained_disk(self._folder):
            (self._folder / (stage or ".")).mkdir(parents=True, exist_ok=True)
        return stage or "."

    def has_run(self, run: str) -> bool:
        return (self._folder / run).is_dir()

    def send(self, run: str, events: Sequence[Event], artifact_url: str | None) -> None:
        """As Sink.send. TensorBoard has no place for parameters, tags, data sets, files and models."""
        if not self.has_run(run):
            raise UnsendableError(f"{self._folder / run} was deleted")
        with explained_disk(self._folder):
            self._read(run)
            writer = self._writers.pop(run, None) or self._open_writer(str(self._folder / run))
            for event in events:
                time_s = event["t"] / 1000
                for name, value in event["values"].items() if event["event"] == "metrics" else ():
                    if not self._holds(run, name, event["step"], time_s):
                        writer.add_scalar(name, value, event["step"], time_s)
                text = _TEXTS.get(event["event"], lambda event: None)(event)
                if text is not None and not self._holds(run, f"{event['file']}/text_summary", 0, time_s):
                    writer.add_text(event["file"], text, 0, time_s)
            writer.flush()
            self._writers[run] = writer  # not after an error: its thread may have died

    def _read(self, run: str) -> None:
        """Read what this process or another added to the run's files, up to a record that a kill left torn."""
        for path in sorted((self._folder / run).glob("events.out.tfevents.*")):
            self._readers[path] = self._readers.get(path) or self._open_reader(str(path))
            for event in self._readers[path].Load():
                for value in event.summary.value:
                    steps, latest_s = self._held.get((run, value.tag), (StepSet(), 0.0))
                    steps.add(event.step)
                    self._held[run, value.tag] = steps, max(latest_s, event.wall_time)

    def _holds(self, run: str, tag: str, step: int, time_s: float) -> bool:
        """Whether the files hold a point. A later one at a step that they hold is another point."""
        steps, latest_s = self._held.get((run, tag), (StepSet(), 0.0))
        return step in steps and time_s <= latest_s


def _json_text(event: Event) -> str:
    return f"```\n{json.dumps(event['content'], indent=2)}\n```"


def _table_text(event: Event) -> str:
    lines = [event["columns"], ["---"] * len(event["columns"]), *event["rows"]]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines)


_TEXTS: dict[str, Callable[[Event], str | None]] = {"json": _json_text, "table": _table_text}


@dataclass(frozen=True)
class TensorboardTarget(Target):
    """A folder with one folder per pipeline run."""

    name: ClassVar[str] = "TensorBoard"
    package: ClassVar[str] = "tensorboard"
    log_dir: Path

    @property
    def where(self) -> str:
        return f"TensorBoard in {self.log_dir}"

    def open(self, run_id: str) -> TensorboardSink:
        return TensorboardSink(self.log_dir / run_id)

    def viewer(self) -> str | None:
        return f"tensorboard --logdir {quote(str(self.log_dir))}" if self.log_dir.is_dir() else None


class TensorboardConfig(SinkConfig):
    """A folder that TensorBoard shows, on the machine that drives the run."""

    target_type: ClassVar[type[Target]] = TensorboardTarget
    kind: Literal["tensorboard"] = "tensorboard"
    log_dir: LocalFolder | None = Field(
        None, description="Folder for its files; left out: `tensorboard` under `storage`."
    )

    def target(self, storage: Storage) -> TensorboardTarget:
        return TensorboardTarget(Path(self.log_dir) if self.log_dir else local_folder(storage, "tensorboard"))
