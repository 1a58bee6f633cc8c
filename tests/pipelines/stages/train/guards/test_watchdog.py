"""A worker under Ray Train that is frozen by SIGSTOP: named, killed, and the training goes on as if nothing was."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from pipelines.errors import LostError
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.launch import run_training
from pipelines.stages.train.stage import TrainInputs, make_job
from pipelines.tracking.journal import read_events
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of, weights
from tests.pipelines.waiting import wait_until


@pytest.mark.slow
def test_a_frozen_worker_is_named_and_killed_and_training_goes_on_from_its_checkpoint(
    ray_cluster: None, train_config: Callable[..., TrainStageConfig], tokens: Tokens, tmp_path: Path
) -> None:
    config = train_config(
        resources={"num_workers": 2}, checkpoint_every_steps=3, log_every_steps=1, validation_batches=1, hang_after_s=25
    )
    unbroken = make_job(
        config, TrainInputs((tokens,)), context_of(tmp_path / "whole"), FileSink(tmp_path / "whole.jsonl")
    )
    run_training(unbroken)
    sink = FileSink(tmp_path / "frozen.jsonl", kill_at_step=5, signal=signal.SIGSTOP)
    context = context_of(tmp_path / "frozen")
    job = make_job(config, TrainInputs((tokens,)), context, sink)
    with closing(context.journal):
        with pytest.raises(LostError, match="Training hangs") as caught:
            run_training(job, journal=context.journal)
        message = str(caught.value)
        frozen = next(pid for step, pid in sink.points("pid") if step == 5)
        assert (
            f"Rank 0 (host {socket.gethostname()}, process {int(frozen)}) is silent: its process is stopped (SIGSTOP"
            in message
        )
        assert re.search(r"Rank 1 \(host .*, process \d+\) waits in pipelines/stages/train/\S+:\d+ \(\w+\)", message)
        wait_until(lambda: not psutil.pid_exists(int(frozen)))
        (report,) = (tmp_path / "frozen" / "hangs").iterdir()
        assert str(report) in message
        text = report.read_text()
        assert "rank 0: " in text
        assert "SILENT" in text
        assert "---- rank 1\nthread 'TrainingThread" in text
        assert "all_reduce" in text
        shown = [event["path"] for event, _ in read_events(context.journal.path) if event["event"] == "artifact"]
        assert shown == [f"hangs/{report.name}"]
        run_training(job, attempt=2, journal=context.journal)
    assert {name: value.tolist() for name, value in weights(tmp_path / "frozen").items()} == {
        name: value.tolist() for name, value in weights(tmp_path / "whole").items()
    }
