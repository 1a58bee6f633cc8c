"""`bmojo sync` and `bmojo ui` as commands, in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.engine.runs import Run, RunInfo
from pipelines.engine.storage import Storage
from pipelines.tracking.mlflow_sink import MlflowSink
from pipelines.tracking.replay import RUN_JOURNAL
from pipelines.tracking.run_tracking import RunTracking, TrackingOptions
from pipelines.tracking.target import resolve_target

BMOJO = [sys.executable, "-m", "pipelines"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage whose folder needs quoting, with one run of which MLflow knows nothing yet."""
    root = tmp_path_factory.mktemp("a storage") / "100%25 ü"
    store = Storage(root)
    run = Run(store, "p-0123abcd")
    config = {"tracking": {"uri": None, "experiment": "e", "system_metrics": False}}
    run.write_info(
        RunInfo(
            run_id=run.run_id,
            name="p",
            config=config,
            config_path=None,
            created_at="2026-01-01T00:00:00+00:00",
            git_commit=None,
            fingerprints={},
        ),
        1,
    )
    target = resolve_target(None, "e", store)
    MlflowSink(target, run.run_id)
    tracking = RunTracking(store, run.relpath, run.run_id, TrackingOptions(target), [].append)
    with tracking.open_stage(RUN_JOURNAL) as journal:
        journal.write("start", tags={}, artifact_url=None)
    with tracking.open_stage("train") as journal:
        journal.write("start", tags={}, artifact_url=str(root))
        for step in range(3):
            journal.log_metrics(step, {"x": float(step)})
    return root


def bmojo(*arguments: str, tracking_uri: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    if tracking_uri is not None:
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    return subprocess.run(
        [*BMOJO, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_sync_says_what_it_did_and_exits_accordingly(storage: Path) -> None:
    away = bmojo("sync", "--storage", str(storage), tracking_uri="http://127.0.0.1:9")
    assert away.returncode == 75
    assert "0 points delivered, 5 remain" in away.stderr
    assert "cannot be reached" in away.stderr
    nonsense = bmojo("sync", "--storage", str(storage), tracking_uri="foo bar")
    assert nonsense.returncode == 1
    assert "MLFLOW_TRACKING_URI=foo bar: MLflow has no store of this kind" in nonsense.stderr
    for failed in (away, nonsense):
        assert "Traceback" not in failed.stdout + failed.stderr
        assert len(failed.stderr.splitlines()) < 10
    first = bmojo("sync", "--storage", str(storage))
    assert first.returncode == 0, first.stderr
    assert "5 points delivered; everything is in MLflow" in first.stdout
    second = bmojo("sync", "--storage", str(storage))
    assert second.returncode == 0
    assert "nothing to deliver: everything is in MLflow" in second.stdout


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def ui(storage: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(
        [*BMOJO, "ui", "--storage", str(storage), "--port", str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_ui_answers_where_it_says_and_leaves_nothing_behind(
    storage: Path, port: int, ui: subprocess.Popen[str]
) -> None:
    assert ui.stdout is not None
    assert f"http://127.0.0.1:{port}" in ui.stdout.readline()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
        assert b"MLflow" in page.read()
    family = psutil.Process(ui.pid).children(recursive=True)
    assert len(family) <= 3
    taken = bmojo("ui", "--storage", str(storage), "--port", str(port))
    assert taken.returncode == 1
    assert "cannot be listened on (Address already in use)" in taken.stderr
    assert "--port" in taken.stderr
    os.kill(ui.pid, signal.SIGINT)
    out, err = ui.communicate(timeout=30)
    assert ui.returncode == 130
    assert "Model training" in out
    assert err == ""
    assert not [process for process in family if process.is_running()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ui_told_to_end_or_killed_takes_its_server_along(
    port: int, ui: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert ui.stdout is not None
    ui.stdout.readline()
    family = psutil.Process(ui.pid).children(recursive=True)
    assert family
    os.kill(ui.pid, number)
    assert ui.wait(timeout=30) == (75 if number is signal.SIGTERM else -9)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_ui_interrupted_while_it_starts_prints_no_traceback(ui: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not psutil.Process(ui.pid).children() and time.monotonic() < deadline:
        time.sleep(0.02)
    family = psutil.Process(ui.pid).children(recursive=True)
    os.kill(ui.pid, signal.SIGINT)
    out, err = ui.communicate(timeout=30)
    assert "Traceback" not in out + err
    assert not [process for process in family if process.is_running()]
