"""How far a stage is, as its journal tells the scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.engine.stage import ProgressMetrics, tells_progress
from pipelines.engine.under_way import StageRun
from pipelines.storage import open_storage
from pipelines.tracking.journal import Journal
from tests.pipelines.engine.counting_pipeline import CountStage, counting_pipeline


class Idle:
    """An attempt that does nothing."""

    pid = 1

    def stop(self) -> None: ...

    def kill(self) -> None: ...


@pytest.mark.parametrize("shown", [{}, {"loss": "{:.1f}"}])
def test_steps_count_whatever_is_shown_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: dict[str, str]
) -> None:
    """A stage may show nothing but its steps, as `evaluate` does."""
    monkeypatch.setattr(CountStage, "progress", ProgressMetrics("total", shown))
    stage = StageRun(counting_pipeline(open_storage(tmp_path / "store")).plan()[0])
    path = tmp_path / "count.000001.jsonl"
    notices: list[str] = []
    stage.begin(Idle(), path, lambda step, values: None, notices.append)
    with Journal(path) as journal:
        journal.log_metrics(0, {"total": 9})
        journal.log_metrics(7, {"loss": 0.5})
        journal.log_notice("goes on with half of it")
        journal.log_metrics(60, {"system/disk_usage_percentage": 3.0})
    stage.end()
    assert notices == ["goes on with half of it"]
    assert stage.sample() == {"done": 7, "total": 9, "values": {"loss": 0.5} if shown else {}}


def test_the_machines_metrics_tell_no_progress() -> None:
    assert not tells_progress({"system/cpu": 1.0})
    assert tells_progress({"system/cpu": 1.0, "loss": 2.0})
