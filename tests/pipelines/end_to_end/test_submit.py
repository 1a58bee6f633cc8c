"""`bmojo submit` to a real Ray head with a token: from another directory, terminal closed, killed, cancelled."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.engine.records import read_record
from pipelines.engine.runs import Run, find_run
from pipelines.storage import open_storage
from tests.pipelines.waiting import wait_until

pytestmark = pytest.mark.slow  # what is sent, and what is made of the answers: tests/pipelines/submit/

ROOT = Path(__file__).resolve().parents[3]
SECRET = "a-value-that-nobody-may-see"

PIPELINE = """\
name: counting
storage: runs
stages:
  count:
    kind: python
    call: counting:count
    args: {{gate: {gate}}}
"""
MODULE = """\
import os
import time
from pathlib import Path

from pipelines.stages.python import RunningStage


def count(stage: RunningStage) -> dict[str, float]:
    for step in range(1, 11):
        (stage.folder / f"{step}.txt").touch()
        stage.progress(step, 10)
        while step == 5 and not Path(stage.args["gate"]).exists():
            time.sleep(0.05)
    return {"steps": len(list(stage.folder.iterdir())), "secret": len(os.environ.get("COUNTING_PASSWORD", ""))}
"""


@dataclass(frozen=True)
class Cluster:
    """A head that runs on this machine, as somebody else started it."""

    home: Path
    url: str
    folder: Path  # of Ray's sessions

    def environment(self, **changes: str) -> dict[str, str]:
        """Of a user of the cluster, whose home has its token."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        return {**ours, "HOME": str(self.home), "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT), **changes}

    def client(self) -> Any:
        """Ray's own, with the token."""
        from ray.job_submission import JobSubmissionClient

        with pytest.MonkeyPatch.context() as patch:
            for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
                patch.delenv(name, raising=False)
            token = (self.home / ".ray/auth_token").read_text()
            return JobSubmissionClient(self.url, headers={"Authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="bmojo-head-", dir="/tmp"))  # short, for Ray's sockets
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text(secrets.token_hex(32))
    with ExitStack() as sockets:
        free = []
        for _ in range(6):
            free.append(sockets.enter_context(socket.socket()))
            free[-1].bind(("127.0.0.1", 0))
        port, dashboard, agent, agent_grpc, metrics, client = (each.getsockname()[1] for each in free)
    found = Cluster(home, f"http://127.0.0.1:{dashboard}", home / "ray")
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    head = subprocess.Popen(
        [scripts / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--include-dashboard=true",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
         f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}",
         f"--ray-client-server-port={client}", f"--temp-dir={found.folder}", "--disable-usage-stats"],
        env=found.environment(PATH=path, PYTHONPATH=""), cwd=home,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: head.poll() is not None or answers(found))
        assert head.poll() is None
        yield found
    finally:
        tree = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        head.terminate()
        _, alive = psutil.wait_procs(tree, timeout=30)
        for process in alive:
            process.kill()
        shutil.rmtree(home, ignore_errors=True)


def answers(cluster: Cluster) -> bool:
    try:
        return isinstance(cluster.client().list_jobs(), list)
    except Exception:
        return False


@dataclass(frozen=True)
class Project:
    """A pipeline with code beside it, submitted from a directory beside it."""

    folder: Path
    cluster: Cluster

    @property
    def gate(self) -> Path:
        """The stage waits in its middle until this is there."""
        return self.folder / "gate"

    def write(self) -> Project:
        """The files."""
        (self.folder / "project").mkdir()
        (self.folder / "elsewhere").mkdir()
        (self.folder / "project/counting.yaml").write_text(PIPELINE.format(gate=self.gate))
        (self.folder / "project/counting.py").write_text(MODULE)
        return self

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """A command in the other directory, in a session of its own, as a terminal's."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines", *arguments],
            cwd=self.folder / "elsewhere", env=self.cluster.environment(COLUMNS="200", **environment),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def bmojo(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run a command to its end."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate()
        return process.returncode, output

    def submit(self, *options: str, **environment: str) -> tuple[int, str]:
        """Submit the pipeline."""
        return self.bmojo("submit", "../project/counting.yaml", "--address", self.cluster.url, *options, **environment)

    def submitted(self) -> dict[str, str]:
        """Submit it; what is printed for programs."""
        code, output = self.submit("--json")
        assert code == 0, output
        found: dict[str, str] = json.loads(output[output.index("{") : output.index("}") + 1])
        return found

    def run(self) -> Run:
        """The run there is."""
        return find_run(open_storage(self.folder / "elsewhere/runs"))

    def wait_for_the_middle(self) -> Run:
        """Wait until the stage waits."""
        wait_until(lambda: list((self.folder / "elsewhere/runs").glob("artifacts/python/*/files/5.txt")), 120)
        return self.run()

    def job(self, job_id: str) -> Any:
        """What Ray says of a job, once it has ended."""
        client = self.cluster.client()
        wait_until(lambda: client.get_job_info(job_id).status.is_terminal())
        return client.get_job_info(job_id)


@pytest.fixture
def project(tmp_path: Path, cluster: Cluster) -> Project:
    return Project(tmp_path, cluster).write()


def test_submitted_from_another_directory_and_followed_to_its_end(project: Project) -> None:
    project.gate.touch()
    code, output = project.submit("--follow", "--env", "COUNTING_PASSWORD", COUNTING_PASSWORD=SECRET)
    assert code == 0, output
    run = project.run()
    assert f"run {run.run_id}. This terminal may be closed." in output
    assert f"bmojo cancel {run.run_id} --storage {project.folder}/elsewhere/runs" in output
    assert "SUCCEEDED in" in output
    assert output.count("count: running ...") == 1
    artifact = run.artifact_of(run.stored_state().stages["count"])
    assert artifact is not None
    record = read_record(artifact)
    assert record is not None
    assert f'"secret": {len(SECRET)}' in json.dumps(record.output), "the variable did not reach the worker"
    assert SECRET not in output
    assert SECRET not in repr(project.cluster.client().list_jobs())
    logs = [file for file in project.cluster.folder.rglob("logs/**/*") if file.is_file()]
    assert len(logs) > 5
    assert not [file for file in logs if SECRET.encode() in file.read_bytes()]


def test_a_wrong_token_and_none_are_one_screen(project: Project, tmp_path: Path) -> None:
    (tmp_path / "stranger/.ray").mkdir(parents=True)
    for words in ("Token authentication is enabled but", "Invalid authentication token"):
        code, output = project.submit(HOME=str(tmp_path / "stranger"))
        assert code == 1, output
        assert "the Ray cluster refuses the token. Set RAY_AUTH_MODE=token" in output
        assert words in output
        assert len(output.splitlines()) <= 6
        (tmp_path / "stranger/.ray/auth_token").write_text(secrets.token_hex(32))


def test_an_error_at_the_start_of_the_job_is_shown_with_its_exit_code(project: Project) -> None:
    (project.folder / "elsewhere/runs").touch()  # where the storage is to be
    code, output = project.submit()
    assert code == 1, output
    assert "is a file, or is below one" in output
    assert "FAILED: Job entrypoint command failed with exit code 1" in output


def test_it_outlives_its_terminal_and_a_killed_scheduler(project: Project) -> None:
    terminal = project.start("submit", "../project/counting.yaml", "--address", project.cluster.url, "--follow")
    run = project.wait_for_the_middle()
    os.killpg(terminal.pid, signal.SIGHUP)  # the window is closed
    terminal.communicate()
    holder = run.holder()
    assert holder is not None
    assert holder.owner.ray_job is not None
    os.kill(holder.owner.pid, signal.SIGKILL)
    wait_until(lambda: (now := run.holder()) is not None and now.owner.pid != holder.owner.pid)
    project.gate.touch()
    info = project.job(holder.owner.ray_job)
    assert info.driver_exit_code == 0, info
    state = run.state()
    assert (state.status, state.owners) == ("SUCCEEDED", 2)
    said = project.cluster.client().get_job_logs(holder.owner.ray_job)
    assert "The scheduler was killed by SIGKILL. It starts again in 1 s (restart 1 of 10)." in said


def test_cancelling_the_run_ends_the_job_for_good(project: Project) -> None:
    found = project.submitted()
    run = project.wait_for_the_middle()
    assert found["run"] == run.run_id
    code, output = project.bmojo("cancel", found["run"], "--storage", found["storage"])
    assert code == 0, output
    assert project.job(found["job"]).driver_exit_code == 130
    assert run.state().status == "CANCELLED"


def test_ctrl_c_ends_following_and_ray_job_stop_ends_the_job_in_order(project: Project) -> None:
    terminal = project.start("submit", "../project/counting.yaml", "--address", project.cluster.url, "--follow")
    assert terminal.stdout is not None
    for line in terminal.stdout:
        if "count: running" in line:
            break
    run = project.wait_for_the_middle()
    terminal.send_signal(signal.SIGINT)
    output, _ = terminal.communicate()
    assert terminal.returncode == 130
    assert "Not followed any more. Job counting-" in output
    holder = run.holder()
    assert holder is not None
    assert holder.owner.ray_job is not None
    time.sleep(1)
    assert run.holder() == holder or run.holder() is not None, "Ctrl-C reached the job"
    project.cluster.client().stop_job(holder.owner.ray_job)
    assert project.job(holder.owner.ray_job).status == "STOPPED"
    state = run.stored_state()
    assert state.status == "RESUMABLE", "it did not get the time to say so"
    assert state.owners == 1
