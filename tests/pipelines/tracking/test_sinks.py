"""Two sinks of one run: each has its own cursor and its own trouble, whatever happens to the other."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.errors import ConfigError
from pipelines.storage import LocalStorage
from pipelines.tracking import replay
from pipelines.tracking.config import targets_of
from pipelines.tracking.mlflow.target import MlflowConfig
from pipelines.tracking.replay import Replay, deliver_all
from pipelines.tracking.run_tracking import RunTracking, TrackingOptions
from pipelines.tracking.sink import Event
from tests.pipelines.tracking.file_sink import FileSink, FileTarget, write
from tests.pipelines.waiting import wait_until


@pytest.fixture
def pair(tmp_path: Path) -> tuple[FileTarget, FileTarget]:
    targets = FileTarget(tmp_path / "first"), FileTarget(tmp_path / "second")
    for target in targets:
        target.folder.mkdir()
    return targets


def test_a_sink_that_is_down_neither_delays_nor_repeats_the_points_of_another(
    tmp_path: Path, pair: tuple[FileTarget, FileTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_PATIENCE_S", 0.2)
    up, down = pair
    (down.folder / "is down").touch()
    notices: list[str] = []
    options = TrackingOptions(pair, system_metrics=False, drain_s=60)
    tracking = RunTracking(LocalStorage(tmp_path), "runs/r-1", "r-1", options, notices.append)
    tracking.start({}, {}, all_reused=False)
    with tracking.open_stage("train") as journal:
        for step in range(20):
            journal.log_metrics(step, {"loss": 1.0})
        wait_until(lambda: (up.folder / "train").exists() and len(up.steps()) == 20 and notices)
        (notice,) = notices
        assert notice.startswith(f"{down.where} cannot be reached (ConnectionError: no answer)")
        (down.folder / "is down").unlink()
        wait_until(lambda: len(notices) == 2)
        assert notices[1] == f"{down.where} answers again; all points so far are delivered."
        (down.folder / "is down").touch()
        for step in range(20, 30):
            journal.log_metrics(step, {"loss": 1.0})
    (backlog,) = tracking.stop("SUCCEEDED", {})
    assert (backlog.sink, backlog.events) == ("Files", 11)
    (down.folder / "is down").unlink()
    assert deliver_all(Replay(tracking.journal_dir, down, "r-1")).remaining == 0
    for target in pair:
        assert target.steps() == list(range(30))
        assert target.sent() == list(range(30))


def test_nobody_waits_for_a_sink_that_hangs(
    tmp_path: Path, pair: tuple[FileTarget, FileTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()
    send = FileSink.send
    hung: list[bool] = []

    def hanging(self: FileSink, run: str, events: Sequence[Event], artifact_url: str | None) -> None:
        asked.set()
        hung.append(answer.wait(300))
        send(self, run, events, artifact_url)

    monkeypatch.setattr(FileSink, "send", hanging)
    options = TrackingOptions(pair[:1], system_metrics=False, drain_s=300)
    tracking = RunTracking(LocalStorage(tmp_path), "runs/r-1", "r-1", options, [].append)
    tracking.start({}, {}, all_reused=False)
    assert asked.wait(60)
    with tracking.open_stage("train") as journal:
        for step in range(1000):
            journal.log_metrics(step, {"loss": 1.0})
    answer.set()
    assert tracking.stop("SUCCEEDED", {}) == ()
    assert all(hung), "the points were written only after the sink gave up"
    assert pair[0].steps() == list(range(1000))


def die_at(change: int) -> None:
    """End this process, as SIGKILL does, before it changes a file for the nth time."""
    changes = 0

    def deadly(name: str) -> None:
        real = getattr(os, name)

        def changed(*arguments: object, **options: object) -> object:
            nonlocal changes
            changes += 1
            if changes == change:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, changed)

    for name in ("replace", "mkdir", "utime", "open"):
        deadly(name)


def test_killed_before_any_change_of_a_file_two_sinks_hold_each_point_once(
    tmp_path: Path, pair: tuple[FileTarget, FileTarget]
) -> None:
    write(tmp_path / "run", range(5))
    deaths = 0
    for change in range(1, 100):
        child = os.fork()
        if child == 0:
            die_at(change)
            left = [deliver_all(Replay(tmp_path / "run/journal", target, "r")).remaining for target in pair]
            os._exit(sum(left))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        deaths += 1
    assert deaths > 5
    for target in pair:
        assert target.steps() == list(range(5))
        assert deliver_all(Replay(tmp_path / "run/journal", target, "r")).delivered == 0


def test_a_cursor_of_an_earlier_version_is_made_again_and_doubles_nothing(
    tmp_path: Path, pair: tuple[FileTarget, FileTarget]
) -> None:
    target = pair[0]
    write(tmp_path / "run", range(5))
    deliver_all(Replay(tmp_path / "run/journal", target, "r"))
    cursor = tmp_path / "run" / f"delivered-{target.key}.json"
    saved = json.loads(cursor.read_text())
    cursor.write_text(json.dumps({"mlflow_runs": saved["runs"], "journals": saved["journals"]}))
    write(tmp_path / "run", range(5, 8))
    assert deliver_all(Replay(tmp_path / "run/journal", target, "r")).remaining == 0
    assert target.steps() == list(range(8))
    assert json.loads(cursor.read_text())["runs"] == saved["runs"]


def test_a_run_that_a_user_deleted_from_one_sink_is_delivered_there_again(
    tmp_path: Path, pair: tuple[FileTarget, FileTarget]
) -> None:
    write(tmp_path / "run", range(5))
    for target in pair:
        deliver_all(Replay(tmp_path / "run/journal", target, "r"))
    for path in (pair[0].folder / "train").iterdir():
        path.unlink()
    (pair[0].folder / "train").rmdir()
    write(tmp_path / "run", range(5, 6))
    for target in pair:
        deliver_all(Replay(tmp_path / "run/journal", target, "r"))
        assert target.steps() == list(range(6))
    assert sorted(pair[1].sent()) == list(range(6))


def test_the_same_place_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking.1: MLflow at .* is in the list twice"):
        targets_of((MlflowConfig(), MlflowConfig(system_metrics=False)), LocalStorage(tmp_path))
