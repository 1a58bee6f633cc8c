"""Two schedulers on one run: exactly one works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.engine.event_log import read_events as history_of
from pipelines.engine.events import Started, Status
from pipelines.engine.runs import list_runs
from pipelines.storage import Storage, open_storage
from pipelines.tracking.journal import read_events
from pipelines.tracking.spool import Spool

TIMES = 50


def check(storage: Storage, times: int) -> None:
    command = [sys.executable, "-m", "tests.pipelines.engine.two_schedulers", storage.url, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    outcomes = [sorted(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(outcomes) == times, done.stdout + done.stderr
    refused = 0
    for number, pair in enumerate(outcomes):
        assert pair in (["SUCCEEDED", "refused"], ["SUCCEEDED", "SUCCEEDED"]), pair
        refused += "refused" in pair
        (run,) = list_runs(open_storage(f"{storage.url}/{number}"))
        state = run.state()
        assert state.status is Status.SUCCEEDED
        assert [stage.attempts for stage in state.stages.values()] == [1, 1], "the second found all of it done"
        entries = history_of(run.storage, run.events_relpath)
        assert len({entry.position.owner for entry in entries if isinstance(entry.event, Started)}) == 1
        spool = Spool(run.storage, run.relpath)
        spool.download()
        journals = spool.journal_dir.glob("count.*")
        steps = [event["step"] for path in journals for event, _ in read_events(path) if event["event"] == "metrics"]
        assert steps == [0, 1, 2]
    assert refused > times / 2, "most of them met"


def test_two_schedulers_start_at_once(tmp_path: Path) -> None:
    check(open_storage(tmp_path), 10)


@pytest.mark.slow
def test_two_schedulers_start_at_once_many_times(tmp_path: Path) -> None:
    check(open_storage(tmp_path), TIMES)


@pytest.mark.ci
def test_two_schedulers_start_at_once_on_s3(s3_storage: Storage) -> None:
    check(s3_storage, 2)


@pytest.mark.slow
def test_two_schedulers_start_at_once_many_times_on_s3(s3_storage: Storage) -> None:
    check(s3_storage, TIMES)
