"""The training loop with a trainer of a few lines instead of a backend: what the protocol gives it is enough."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bmojo.checkpoint_io import load_pretrained
from kernels.operator import OPERATORS
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train import layout
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.stage import TrainInputs, make_job
from tests.pipelines.stages.train.plain_trainer import train_plainly
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of, weights

pytestmark = pytest.mark.usefixtures("single_process")


class Trained(NamedTuple):
    """A finished run of the loop."""

    folder: Path
    job: TrainJob
    facts: TrainFacts


@pytest.fixture(scope="module")
def config(train_config: Callable[..., TrainStageConfig]) -> TrainStageConfig:
    """12 steps of 4 micro batches with a checkpoint every 6."""
    return train_config(checkpoint_every_steps=6, log_every_steps=1, validation_batches=2, lr=1e-2)


@pytest.fixture(scope="module")
def straight(
    single_process: None, config: TrainStageConfig, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp("loop") / "train-0"
    for operator in OPERATORS.values():
        operator.ran.clear()  # what other tests of this process ran
    job = make_job(config, TrainInputs((tokens,)), context_of(folder), FileSink(folder.with_suffix(".jsonl")))
    return Trained(folder, job, train_plainly(job))


def test_it_trains_validates_and_writes_the_model(straight: Trained) -> None:
    facts = straight.facts
    assert facts.steps == 12
    assert facts.initial_valid_loss is not None
    assert facts.final_valid_loss is not None
    assert facts.final_valid_loss < facts.initial_valid_loss - 0.5
    assert [step for step, _ in facts.history["train/loss"]] == list(range(1, 13))
    sink = straight.job.metrics
    assert isinstance(sink, FileSink)
    assert sink.points("train/loss") == facts.history["train/loss"]
    assert load_pretrained(straight.folder / "model").config == straight.job.model


def test_the_paths_of_operators_are_told_after_the_first_step(straight: Trained) -> None:
    sink = straight.job.metrics
    assert isinstance(sink, FileSink)
    lines = [json.loads(line) for line in sink.path.read_text().splitlines()]
    told = ["tags" in line for line in lines if "tags" in line or "train/loss" in line]
    assert told == [False, True] + [False] * 11
    (tags,) = sink.tags()
    for operator in ("linear", "memory_attention", "ssd_scan", "innovation_scores"):
        assert "cpp: float32 or float64 on the CPU" in tags[f"bmojo.path.{operator}"]


def test_its_checkpoints_hold_the_trainers_tensors_and_versions(straight: Trained) -> None:
    newest = checkpoints.newest_complete(straight.job.artifact)
    assert newest is not None
    assert newest.state.step == newest.state.optimizer_steps == 12
    assert newest.state.versions == {"torch": torch.__version__}
    names = weights(straight.folder).keys()
    assert dict(newest.parameters()).keys() == names
    assert dict(newest.moments()).keys() == {f"{m}/{name}" for m in ("exp_avg", "exp_avg_sq") for name in names}


def test_a_resumed_run_ends_as_the_unbroken_one_to_the_last_bit(
    straight: Trained, tokens: Tokens, tmp_path: Path
) -> None:
    folder = tmp_path / "train-0"
    shutil.copytree(straight.folder / layout.step_dir(6), folder / layout.step_dir(6))
    sink = FileSink(tmp_path / "metrics.jsonl")
    job = replace(make_job(straight.job.config, TrainInputs((tokens,)), context_of(folder), sink), resume_step=6)
    facts = train_plainly(job)
    assert facts.history["train/loss"] == straight.facts.history["train/loss"]
    assert facts.final_valid_loss == straight.facts.final_valid_loss
    expected = weights(straight.folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
