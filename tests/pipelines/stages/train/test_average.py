"""A training by Muon with a moving average of the weights: what it reports, writes and resumes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bmojo.checkpoint_io import load_pretrained
from data.shards import TokenSplit, read_token_batches
from pipelines.stages.train import layout
from pipelines.stages.train.checkpoint import newest_complete
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.stage import TrainInputs, make_job
from tests.pipelines.stages.train.plain_trainer import train_plainly
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of, weights


@pytest.fixture(scope="module")
def averaged(
    single_process: None,
    train_config: Callable[..., TrainStageConfig],
    tokens: Tokens,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, TrainJob, TrainFacts]:
    """8 steps with a checkpoint halfway."""
    config = train_config(
        max_steps=8, checkpoint_every_steps=4, ema_decay=0.7, optimizer={"kind": "muon"}, validation_batches=2, lr=1e-2
    )
    folder = tmp_path_factory.mktemp("average") / "train-0"
    job = make_job(config, TrainInputs((tokens,)), context_of(folder), FileSink(folder.with_suffix(".jsonl")))
    return folder, job, train_plainly(job)


def test_the_final_model_is_the_average_and_the_checkpoint_has_both(
    averaged: tuple[Path, TrainJob, TrainFacts],
) -> None:
    folder, job, _ = averaged
    newest = newest_complete(job.artifact)
    assert newest is not None
    for name, value in weights(folder).items():
        average = newest.read(f"ema/{name}", 0, value.numel())
        assert torch.equal(value.flatten(), average)
        assert not torch.equal(newest.read(f"param/{name}", 0, value.numel()), average)
    assert "momentum/blocks.0.mlp.down_proj.weight" in newest.sizes()
    assert "exp_avg/blocks.0.mlp.down_proj.weight" not in newest.sizes()
    assert "exp_avg_sq/blocks.0.mixer.ssm.conv_weight" in newest.sizes()


def test_both_validation_losses_are_reported(averaged: tuple[Path, TrainJob, TrainFacts]) -> None:
    folder, job, facts = averaged
    model = load_pretrained(folder / "model")
    batches = list(read_token_batches(TokenSplit(job.sources[0].artifact.local, "valid"), 2, max_samples=16))
    with torch.no_grad():
        nll = [model(*batch, token_losses=True) for batch in batches]
    loss = float(sum(out.nll_bt.double().sum() for out in nll) / sum(int(out.num_targets) for out in nll))
    assert facts.averaged_valid_loss == pytest.approx(loss, rel=1e-5)
    assert facts.history["valid/loss_ema"] == [(8, facts.averaged_valid_loss)]
    assert facts.final_valid_loss != facts.averaged_valid_loss


def test_it_resumes_bitwise(averaged: tuple[Path, TrainJob, TrainFacts], tmp_path: Path, tokens: Tokens) -> None:
    whole, job, facts = averaged
    folder = tmp_path / "train-0"
    shutil.copytree(whole / layout.step_dir(4), folder / layout.step_dir(4))
    sink = FileSink(tmp_path / "metrics.jsonl")
    again = train_plainly(
        replace(make_job(job.config, TrainInputs((tokens,)), context_of(folder), sink), resume_step=4)
    )
    assert again.averaged_valid_loss == facts.averaged_valid_loss
    assert again.history["train/loss"] == facts.history["train/loss"]
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
