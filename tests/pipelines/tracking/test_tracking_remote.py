from __future__ import annotations

import time
from pathlib import Path

from pipelines.tracking.journal import Journal, read_events
from pipelines.tracking.remote import RemoteJournal, remote_journal
from pipelines.tracking.run_tracking import JournalWatch
from pipelines.tracking.system_metrics import SystemMetrics


def test_workers_write_through_an_actor_and_a_flush_confirms(tmp_path: Path, ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def work(journal: RemoteJournal, first: int) -> float:
        started = time.monotonic()
        for step in range(first, first + 20):
            journal.log_metrics(step, {"train/loss": float(step)})
        waited_s = time.monotonic() - started
        journal.flush()
        return waited_s

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


def test_system_metrics_go_on_counting_after_a_resume(tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(2):
        with (
            Journal(tmp_path / "j.jsonl") as journal,
            JournalWatch([journal.path], lambda step, values: seen.append(step), poll_s=0.01),
            SystemMetrics(journal, tmp_path, interval_s=0.02),
        ):
            while journal.last_step("system/cpu_utilization_percentage") is None or len(seen) < 2:
                time.sleep(0.01)
            time.sleep(0.05)
    assert seen == list(range(len(seen)))
