"""All ranks stop at the same step, with a checkpoint from which the same bits follow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pipelines.errors import LostError
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train.agreement import Agreement, LeftToGrow
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU
from pipelines.stages.train.layout import step_dir
from pipelines.stages.train.stage import TrainInputs, make_job
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.request import Request
from tests.pipelines.stages.train.plain_trainer import train_plainly
from tests.pipelines.stages.train.stopping_ranks import ASKED_AT_STEP, stop_together
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of, weights


def test_every_rank_stops_at_the_same_step(tmp_path: Path) -> None:
    quick, slow = stop_together((0.02, 0.6), tmp_path)
    for one, other in (quick, slow):
        assert one.step == other.step >= ASKED_AT_STEP
        assert one.questions >= 2
        assert other.questions == 0, "only rank 0 asks"
    assert quick[0].questions < quick[0].step, "not after every step"
    assert slow[0].step <= ASKED_AT_STEP + 1, "about once per second"


@pytest.mark.usefixtures("single_process")
def test_a_question_is_asked_at_most_every_thousand_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    asked_at: list[int] = []
    step = 0

    def was_asked() -> Request:
        asked_at.append(step)
        return Request.NONE

    agreement = Agreement(was_asked, lambda: False, None, CPU)
    for step in range(1, 2500):  # noqa: B007  # was_asked reads it
        now[0] += 1e-5
        assert not agreement.reached()
    assert asked_at == [1, 1001, 2001]


@dataclass(frozen=True)
class StoppingSink(FileSink):
    """Asks training to stop, or to leave, once this step is told."""

    stop_after: int = 10**9
    ask_for: Request = Request.STOP
    told: threading.Event = field(default_factory=threading.Event)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:  # type: ignore[override]
        super().log_metrics(step, values)
        if step >= self.stop_after:
            self.told.set()

    def request(self) -> Request:
        return self.ask_for if self.told.is_set() else Request.NONE


@pytest.mark.ci
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(
    ("stop_after", "ask_for", "error"),
    [(4, Request.STOP, LostError), (6, Request.STOP, LostError), (5, Request.GROW, LeftToGrow)],
)
def test_a_stopped_run_saves_the_step_it_is_at_and_ends_as_the_unbroken_one(
    train_config: Callable[..., TrainStageConfig],
    tokens: Tokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
    ask_for: Request,
    error: type[Exception],
) -> None:
    """Also at steps whose loss nobody reads, and where a checkpoint is due anyway (6)."""
    monkeypatch.setattr("pipelines.stages.train.agreement._EVERY_S", 0.0)  # ask after every step
    config = train_config(checkpoint_every_steps=6, log_every_steps=1, validation_batches=2)

    def train(folder: Path, sink: FileSink) -> None:
        context = context_of(folder)
        with closing(context.journal):
            job = make_job(config, TrainInputs((tokens,)), context, sink)
            train_plainly(replace(job, resume_step=max(checkpoints.complete_steps(job.artifact), default=None)))

    straight = FileSink(tmp_path / "straight.jsonl")
    train(tmp_path / "straight", straight)
    folder = tmp_path / "stopped"
    with pytest.raises(error, match=f"stopped after step {stop_after}, with a checkpoint"):
        train(folder, StoppingSink(tmp_path / "stopped.jsonl", stop_after=stop_after, ask_for=ask_for))
    newest = checkpoints.newest_complete(ArtifactDir.at(folder))
    assert newest is not None
    assert newest.state.step == stop_after
    again = FileSink(tmp_path / "again.jsonl")
    train(folder, again)
    assert again.points("train/loss") == straight.points("train/loss"), "the steps before are told again"
    assert {name: value.tolist() for name, value in weights(folder).items()} == {
        name: value.tolist() for name, value in weights(tmp_path / "straight").items()
    }


@pytest.mark.ci
@pytest.mark.usefixtures("single_process")
def test_a_checkpoint_by_the_clock_changes_no_bit(
    train_config: Callable[..., TrainStageConfig], tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as good as no time between two, there is one after every step."""
    monkeypatch.setattr("pipelines.stages.train.agreement._EVERY_S", 0.0)
    saved: dict[str, list[int]] = {}
    for name, every_s in (("by steps", None), ("by the clock", 1e-9)):
        config = train_config(checkpoint_every_steps=100, checkpoint_every_s=every_s, keep_checkpoints=100)
        context = context_of(tmp_path / name)
        with closing(context.journal):
            job = make_job(config, TrainInputs((tokens,)), context, FileSink(tmp_path / f"{name}.jsonl"))
            train_plainly(job)
        saved[name] = sorted(checkpoints.complete_steps(job.artifact))
        assert all(checkpoints.Checkpoint(job.artifact.local / step_dir(step)) for step in saved[name])
    assert saved["by steps"] == [job.num_steps]
    assert saved["by the clock"] == list(range(1, job.num_steps + 1))
    assert {name: value.tolist() for name, value in weights(tmp_path / "by steps").items()} == {
        name: value.tolist() for name, value in weights(tmp_path / "by the clock").items()
    }
