"""SIGTERM, as a scheduler sends it: exit code 75 with the state saved in time, and the same command resumes."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.engine.runs import find_run
from pipelines.storage import open_storage
from tests.pipelines.end_to_end.tiny_pipeline import (
    TIMEOUT_S,
    Finished,
    TinyPipeline,
    kill_tree,
    wait_until,
    write_pipeline,
)

pytestmark = pytest.mark.slow

EXPORT = """\
  export:
    kind: export
    needs: [train]
"""

# What there is once a stage is in the middle of its work: its journal, or better.
UNDER_WAY = {
    "tokenizer": "runs/*/journal/tokenizer.*.jsonl",
    "tokens": "artifacts/tokenize/*/slices/*.json",
    "train": "artifacts/train/*/checkpoints/step-*/manifest.json",
    "evaluate": "runs/*/journal/evaluate.*.jsonl",
    "report": "runs/*/journal/report.*.jsonl",
    "export": "runs/*/journal/export.*.jsonl",
}


# Training looks about once per second whether it must stop, and the tiny one is done before that.
LONG = ("stages.train.max_steps=600", "stages.train.checkpoint_every_steps=60", "stages.train.log_every_steps=60")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TinyPipeline:
    """A run without a break."""
    pipeline = write_pipeline(tmp_path_factory.mktemp("unbroken"))
    finished = pipeline.run(*LONG)
    assert finished.code == 0, finished.output
    return pipeline


def terminate(pipeline: TinyPipeline, stage: str, *overrides: str) -> Finished:
    """Run the pipeline up to the middle of a stage and send SIGTERM to the driver alone."""
    process = pipeline.start("run", str(pipeline.file), *LONG, *overrides)
    try:
        wait_until(lambda: state(pipeline, stage) == "RUNNING", process)
        wait_until(lambda: bool(list(pipeline.storage.glob(UNDER_WAY[stage]))), process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            kill_tree(process)
    return Finished(process.returncode, output)


def state(pipeline: TinyPipeline, stage: str | None = None) -> str | None:
    """The status of the run, or of one stage of it, as its events say; None: there is no run yet."""
    try:
        saved = find_run(open_storage(str(pipeline.storage))).stored_state()
    except UserError:
        return None
    if stage is None:
        return saved.status.value
    return saved.stages[stage].status.value if stage in saved.stages else None


def assert_ended_in_order(pipeline: TinyPipeline, stage: str, ended: Finished) -> None:
    """A driver that the end of its grace cuts off (pipelines.engine.interrupts) leaves RUNNING in its state file."""
    assert ended.code == 75, ended.output
    assert "Traceback" not in ended.output
    assert "SIGTERM" in ended.output
    assert state(pipeline) == "RESUMABLE"
    assert state(pipeline, stage) == "RESUMABLE"


def test_sigterm_in_any_stage_is_75_and_the_same_command_goes_on(tmp_path: Path, unbroken: TinyPipeline) -> None:
    pipeline = write_pipeline(tmp_path)
    pipeline.file.write_text(pipeline.file.read_text() + EXPORT)
    for stage in UNDER_WAY:
        assert_ended_in_order(pipeline, stage, terminate(pipeline, stage))
    again = pipeline.run(*LONG)
    assert again.code == 0, again.output
    assert state(pipeline) == "SUCCEEDED"
    assert pipeline.record("tokenize")["output"] == unbroken.record("tokenize")["output"]
    for name in ("final_train_loss", "final_valid_loss"):
        assert pipeline.record("train")["output"][name] == unbroken.record("train")["output"][name]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a cluster that was there before, started as people start one, with a token of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield from started_head()


def started_head() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    process = subprocess.Popen(
        [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=4", "--include-dashboard=false",
         "--disable-usage-stats"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ray runtime started" in line:
                break
        yield f"127.0.0.1:{port}"
    finally:
        kill_tree(process)


@pytest.mark.parametrize("stage", ["tokens", "train"])
def test_sigterm_on_a_joined_cluster_is_75_and_leaves_the_cluster_to_others(
    tmp_path: Path, head: str, stage: str
) -> None:
    pipeline = write_pipeline(tmp_path)
    address = f"cluster.address={head}"
    assert_ended_in_order(pipeline, stage, terminate(pipeline, stage, address))
    again = pipeline.run(*LONG, address)
    assert again.code == 0, again.output
    assert state(pipeline) == "SUCCEEDED"
