from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest

from pipelines.tracking.journal import Journal, read_events, workers_journal
from pipelines.tracking.remote import RemoteJournal, log_missing, remote_journal
from pipelines.tracking.run_tracking import JournalWatch
from pipelines.tracking.system_metrics import SystemMetrics
from tests.pipelines.waiting import wait_until


def test_workers_write_through_an_actor_and_a_flush_confirms(tmp_path: Path, ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def work(journal: RemoteJournal, first: int) -> None:
        for step in range(first, first + 20):
            journal.log_metrics(step, {"train/loss": float(step)})
        journal.flush()

    with Journal(tmp_path / "train.jsonl") as driver:
        for first in (0, 10):  # the second attempt repeats ten steps
            with remote_journal(driver) as journal:
                ray.get(work.remote(journal, first))
                path = tmp_path / "train.workers.jsonl"
                steps = [event["step"] for event, _ in read_events(path)]
                assert steps == list(range(first + 20))


def test_a_dead_actor_harms_nobody(tmp_path: Path, ray_cluster: None) -> None:
    import ray

    with Journal(tmp_path / "train.jsonl") as driver, remote_journal(driver) as journal:
        journal.log_metrics(0, {"x": 1.0})
        ray.kill(journal._handle)
        journal.log_metrics(1, {"x": 1.0})
        journal.flush(timeout_s=5)


def test_no_point_is_lost_when_the_actor_is_killed_again_and_again(tmp_path: Path, ray_cluster: None) -> None:
    import ray

    with Journal(tmp_path / "train.jsonl") as driver, remote_journal(driver) as journal:
        for step in range(60):
            journal.log_metrics(step, {"x": float(step)})
            if step % 20 == 10:
                os.kill(ray.get(journal._handle.pid.remote()), signal.SIGKILL)
        assert journal.flush(timeout_s=60)
        assert journal._unconfirmed == []
        events = [event for event, _ in read_events(workers_journal(driver.path))]
        assert sorted(event["step"] for event in events) == list(range(60))


def test_points_of_a_failed_flush_are_brought_by_the_next(tmp_path: Path, ray_cluster: None) -> None:
    with Journal(tmp_path / "train.jsonl") as driver, remote_journal(driver) as journal:
        handle, journal._handle = journal._handle, None
        journal.log_metrics(0, {"x": 0.5})
        assert not journal.flush()
        journal._handle = handle
        assert journal.flush()
        assert [event["values"] for event, _ in read_events(workers_journal(driver.path))] == [{"x": 0.5}]


def test_tags_are_written_once_also_after_a_failed_flush(tmp_path: Path, ray_cluster: None) -> None:
    with Journal(tmp_path / "train.jsonl") as driver, remote_journal(driver) as journal:
        journal.log_tags({"a": "cpp"})
        handle, journal._handle = journal._handle, None
        journal.log_tags({"b": "torch"})
        assert not journal.flush()
        journal._handle = handle
        assert journal.flush()
        assert journal._unconfirmed_tags == {}
        assert [event["tags"] for event, _ in read_events(workers_journal(driver.path))] == [
            {"a": "cpp"},
            {"b": "torch"},
        ]


def test_what_the_work_reports_fills_the_gaps_of_its_journal(tmp_path: Path) -> None:
    path = tmp_path / "train.workers.jsonl"
    with Journal(path) as journal:
        for step in (1, 2, 5):
            journal.log_metrics(step, {"x": float(step)})
    log_missing(path, {"x": [(step, float(step)) for step in range(1, 7)], "y": [(6, 0.5)]})
    told = [(event["step"], event["values"]) for event, _ in read_events(path)]
    assert sorted(step for step, values in told if "x" in values) == [1, 2, 3, 4, 5, 6]
    assert told[-1] == (6, {"y": 0.5})


def test_system_metrics_survive_a_disk_that_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        metrics = SystemMetrics(journal, tmp_path / "not there", interval_s=0.01)
        with caplog.at_level(logging.DEBUG, logger="pipelines.tracking.system_metrics"), metrics:
            wait_until(lambda: "is left out" in caplog.text)
            (tmp_path / "not there").mkdir()
            wait_until(lambda: journal.last_step("system/cpu_utilization_percentage") is not None)


def test_system_metrics_go_on_counting_after_a_resume(tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(2):
        with (
            Journal(tmp_path / "j.jsonl") as journal,
            JournalWatch([journal.path], lambda step, values: seen.append(step), poll_s=0.01),
            SystemMetrics(journal, tmp_path, interval_s=0.02),
        ):
            before = len(seen)
            wait_until(lambda before=before: len(seen) >= before + 2)
    assert seen == list(range(len(seen)))
