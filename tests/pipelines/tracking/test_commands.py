"""`bmojo sync` and `bmojo ui` as commands, in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.engine.runs import Run
from pipelines.storage import Storage, open_storage
from pipelines.tracking.mlflow.target import MlflowConfig, MlflowTarget
from pipelines.tracking.replay import RUN_JOURNAL
from pipelines.tracking.run_tracking import RunTracking, TrackingOptions
from tests.pipelines.made_runs import made_run
from tests.pipelines.waiting import wait_until

BMOJO = [sys.executable, "-m", "pipelines"]
REPOSITORY = Path(__file__).parents[3]
NOWHERE = MlflowTarget("http://127.0.0.1:9", "e")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage whose folder needs quoting, with one run of which MLflow knows nothing yet."""
    root = tmp_path_factory.mktemp("a storage") / "100%25 ü"
    store = open_storage(root)
    run = a_run(store)
    target = MlflowConfig(experiment="e").target(store)
    target.open(run.run_id)
    tracking = RunTracking(store, run.relpath, run.run_id, TrackingOptions((target,)), [].append)
    with tracking.open_stage(RUN_JOURNAL) as journal:
        journal.write("start", tags={}, artifact_url=None)
    with tracking.open_stage("train") as journal:
        journal.write("start", tags={}, artifact_url=str(root))
        for step in range(3):
            journal.log_metrics(step, {"x": float(step)})
    return root


def a_run(store: Storage) -> Run:
    """What a driver writes first of a run."""
    config = {"tracking": {"uri": None, "experiment": "e", "system_metrics": False}}
    return made_run(store, "p-0123abcd", config)


def bmojo(*arguments: str, tracking_uri: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    if tracking_uri is not None:
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    return subprocess.run(
        [*BMOJO, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.ci
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


@pytest.fixture(scope="module")
def without_mlflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has all packages of this one but MLflow."""
    packages = tmp_path_factory.mktemp("packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("mlflow"):
            (packages / path.name).symlink_to(path)
    return {**os.environ, "COLUMNS": "200", "PYTHONPATH": f"{REPOSITORY}:{packages}"}


def test_a_missing_package_is_called_that_by_sync_and_before_a_run(
    tmp_path: Path, without_mlflow: dict[str, str]
) -> None:
    away = open_storage(tmp_path)
    run = a_run(away)
    tracking = RunTracking(away, run.relpath, run.run_id, TrackingOptions((NOWHERE,)), [].append)
    with tracking.open_stage("train") as journal:
        journal.write("start", tags={}, artifact_url=None)
    check = (
        "from pipelines.tracking.run_tracking import check_target; from pipelines.tracking.mlflow.target import *; "
        f"check_target(MlflowTarget({NOWHERE.uri!r}, 'e'), 'r')"
    )
    for command in (["-m", "pipelines", "sync", "--storage", str(tmp_path)], ["-c", check]):
        done = subprocess.run(
            [sys.executable, "-S", *command],
            env=without_mlflow,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1
        assert "the package mlflow is not installed here" in done.stderr
        assert "pip install mlflow" in done.stderr


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def ui(storage: Path, port: int, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """`bmojo ui`, with more options as the fixture's parameter."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(
        [*BMOJO, "ui", "--storage", str(storage), "--port", str(port), *getattr(request, "param", ())],
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


@pytest.mark.ci
def test_ui_answers_where_it_says_and_leaves_nothing_behind(
    storage: Path, port: int, ui: subprocess.Popen[str]
) -> None:
    assert ui.stdout is not None
    assert f"http://127.0.0.1:{port}" in ui.stdout.readline()
    assert "Model training" in ui.stdout.readline()  # communicate() may lose a line that is read ahead
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
        assert b"MLflow" in page.read()
    family = psutil.Process(ui.pid).children(recursive=True)
    assert len(family) <= 3
    taken = bmojo("ui", "--storage", str(storage), "--port", str(port))
    assert taken.returncode == 1
    assert "cannot be listened on (Address already in use)" in taken.stderr
    assert "--port" in taken.stderr
    os.kill(ui.pid, signal.SIGINT)
    _, err = ui.communicate()
    assert ui.returncode == 130
    assert err == ""
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_ui_interrupted_while_it_starts_prints_no_traceback(ui: subprocess.Popen[str]) -> None:
    wait_until(lambda: any("mlflow" in child.cmdline() for child in psutil.Process(ui.pid).children()))
    family = psutil.Process(ui.pid).children(recursive=True)
    os.kill(ui.pid, signal.SIGINT)
    out, err = ui.communicate()
    assert "Traceback" not in out + err
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("ui", "answers", "number"),
    [
        (
            ("--host", "0.0.0.0"),
            {socket.gethostname(): 200, "localhost": 200, "10.1.2.3": 200, "evil.example.org": 403},
            signal.SIGTERM,
        ),
        pytest.param(
            ("--host", "0.0.0.0", "--allowed-hosts", "gpu01.example.org*"),
            {"gpu01.example.org": 200, "localhost": 403},
            signal.SIGKILL,
            marks=pytest.mark.slow,
        ),
    ],
    indirect=["ui"],
)
def test_ui_answers_by_this_machines_names_or_those_that_are_given_and_takes_its_server_along_when_it_ends(
    port: int, ui: subprocess.Popen[str], answers: dict[str, int], number: signal.Signals
) -> None:
    assert ui.stdout is not None
    assert f"http://0.0.0.0:{port}" in ui.stdout.readline()
    found = {}
    for name in answers:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": f"{name}:{port}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as page:
                found[name] = page.status
        except urllib.error.HTTPError as error:
            found[name] = error.code
    assert found == answers
    family = psutil.Process(ui.pid).children(recursive=True)
    assert family
    os.kill(ui.pid, number)
    assert ui.wait() == (75 if number is signal.SIGTERM else -9)
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
