"""Progress on the console: one bar per stage on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data.sources.digests import shown_by
from pipelines.engine.stage import ProgressMetrics

LOG_EVERY_S = 15.0


class StageProgress:
    """Follows the metrics of one stage. `update` may be called as often as points come."""

    def __init__(self, progress: Progress | None, console: Console, name: str, metrics: ProgressMetrics | None) -> None:
        self._progress = progress
        self._console = console
        self._name = name
        self._metrics = metrics or ProgressMetrics("", {})
        self._done = 0
        self._latest: dict[str, float] = {}
        self._last_line_at = time.monotonic()
        self._task = progress.add_task(name, total=None, detail="") if progress else None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the newest values of some metrics; `step` is how far the stage is."""
        self._latest.update(metrics)
        has_moved = step > self._done
        self._done = max(self._done, step)
        done, total = self._done, self._latest.get(self._metrics.total)
        shown = self._metrics.shown
        detail = "  ".join(text.format(self._latest[key]) for key, text in shown.items() if key in self._latest)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, detail=detail)
        elif has_moved and time.monotonic() - self._last_line_at > LOG_EVERY_S:
            self._last_line_at = time.monotonic()
            of_total = f" of {total:,.0f}" if total else ""
            self._console.print(f"  {self._name}: {done:,.0f}{of_total}  {detail}")

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)


@contextmanager
def progress_display(console: Console) -> Iterator[Progress | None]:
    """Rich's progress bars on a terminal; None elsewhere, where lines are printed instead."""
    if not console.is_terminal:
        yield None
        return
    columns: list[Any] = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


@contextmanager
def source_progress(progress: Progress | None, console: Console) -> Iterator[None]:
    """Show how far the files of a source are read to know their content, where that takes a while."""
    task: TaskID | None = None
    last_line_at = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal task, last_line_at
        done_mb, total_mb = done >> 20, total >> 20
        if progress is not None:
            if task is None:
                task = progress.add_task("reading the source's files (MB)", total=total_mb, detail="")
            progress.update(task, completed=done_mb, total=total_mb, visible=done < total)
        elif time.monotonic() - last_line_at > LOG_EVERY_S:
            last_line_at = time.monotonic()
            console.print(f"  reading the source's files: {done_mb:,} of {total_mb:,} MB", markup=False)

    with shown_by(show):
        yield


@contextmanager
def delivery_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that shows `done` of `total`: a bar on a terminal, a line now and then elsewhere."""
    with progress_display(console) as progress:
        task = progress.add_task(what, total=None, detail="") if progress else None
        last_line_at = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal last_line_at
            if progress is not None and task is not None:
                progress.update(task, completed=done, total=total)
            elif time.monotonic() - last_line_at > LOG_EVERY_S:
                last_line_at = time.monotonic()
                console.print(f"  {what}: {done:,} of {total:,}", markup=False)

        yield update
