"""A sink in plain files, which tests may take down, and a small run to deliver."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipelines.tracking.journal import Journal
from pipelines.tracking.sink import Event, Target


class FileSink:
    """Keeps every point in a file of its own, named after what makes it the same point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_run(self, stage: str | None, time_ms: int) -> str:
        run = stage or "pipeline"
        (self.folder / run).mkdir(parents=True, exist_ok=True)
        return run

    def has_run(self, run: str) -> bool:
        return (self.folder / run).is_dir()

    def send(self, run: str, events: Sequence[Event], artifact_url: str | None) -> None:
        for event in events:
            if (self.folder / "is down").exists():
                raise ConnectionError("no answer")
            with open(self.folder / "calls", "a") as calls:
                calls.write(json.dumps([run, event["event"], event.get("step")]) + "\n")
            if event["event"] == "metrics":
                (self.folder / run / f"{event['step']}-{event['t']}").touch()


@dataclass(frozen=True)
class FileTarget(Target):
    """The folder of a FileSink."""

    name: ClassVar[str] = "Files"
    package: ClassVar[str] = "json"
    folder: Path

    @property
    def where(self) -> str:
        return f"files in {self.folder}"

    def open(self, run_id: str) -> FileSink:
        return FileSink(self.folder)

    def steps(self) -> list[int]:
        """The steps of the points that the sink holds, repeated ones as often as it holds them."""
        return sorted(int(path.name.split("-")[0]) for path in (self.folder / "train").iterdir())

    def sent(self) -> list[int]:
        """The steps of the points that were sent, repeated ones as often as they were."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [step for run, event, step in calls if (run, event) == ("train", "metrics")]


def write(run_dir: Path, steps: range) -> None:
    """Journal a stage `train` that did these steps."""
    with Journal(run_dir / "journal/train.jsonl") as journal:
        journal.write("start", tags={}, artifact_url=None)
        for step in steps:
            journal.log_metrics(step, {"loss": float(step)}, time_ms=1_700_000_000_000 + step)
        journal.log_json("record.json", {})
