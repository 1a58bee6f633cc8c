"""Training on a mixture: exact shares, curves by source, refusals that say what to write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import UserError
from data.errors import DataError
from data.mixture import Mixture, Phase
from data.shards import TokenBatch, TokenSplit, read_token_batches
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.errors import FieldError
from pipelines.stages.train import layout
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.job import TrainJob
from pipelines.stages.train.sources import mean_by_weight, source_losses
from pipelines.stages.train.stage import TrainInputs, TrainStage, make_job
from tests.pipelines.stages.train.plain_trainer import train_plainly
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of, weights, write_tokens

SHARES = {"tokens": 0.75, "more": 0.25}


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("more"), "more", first=1000)


@pytest.fixture(scope="module")
def job_of(train_config: Callable[..., TrainStageConfig], tokens: Tokens, more: Tokens) -> Callable[..., TrainJob]:
    def make(folder: Path, **data: Any) -> TrainJob:
        config = train_config(
            needs=("tokens", "more"),
            checkpoint_every_steps=6,
            log_every_steps=1,
            validation_batches=2,
            lr=1e-2,
            data={"weights": SHARES, **data},
        )
        return make_job(config, TrainInputs((tokens, more)), context_of(folder), FileSink(folder.with_suffix(".jsonl")))

    return make


@pytest.mark.usefixtures("single_process")
def test_it_trains_on_its_shares_with_curves_by_source_and_resumes_bitwise(
    job_of: Callable[..., TrainJob], tmp_path: Path
) -> None:
    job = job_of(tmp_path / "train-0")
    facts = train_plainly(job)
    assert job.mixture.counts(12 * 8) == [72, 24]
    for metric in ("train/loss/tokens", "train/loss/more"):
        assert [step for step, _ in facts.history[metric]] == list(range(1, 13))
    of_source = [dict(facts.history[f"train/loss/{name}"]) for name in SHARES]
    for step, loss in facts.history["train/loss"]:
        # Samples have about as many targets; the last of a slice is shorter.
        assert loss == pytest.approx(0.75 * of_source[0][step] + 0.25 * of_source[1][step], rel=0.02)
    for step, loss in facts.history["valid/loss"]:
        by_source = {name: dict(facts.history[f"valid/loss/{name}"])[step] for name in SHARES}
        assert loss == pytest.approx(mean_by_weight(by_source, SHARES))

    folder = tmp_path / "train-1"
    shutil.copytree(tmp_path / "train-0" / layout.step_dir(6), folder / layout.step_dir(6))
    resumed = train_plainly(replace(job_of(folder), resume_step=6))
    for metric in ("train/loss", "train/loss/tokens", "train/loss/more", "valid/loss/more"):
        assert resumed.history[metric] == facts.history[metric]
    expected = weights(tmp_path / "train-0")
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())


class KnowsItsSources:
    """A trainer to which each sequence of the first source costs 1 nat per token, and each of the second 2."""

    device = exact_device = torch.device("cpu")

    def __init__(self, sources: Sequence[Tokens]) -> None:
        self.costs = {
            tuple(row): number
            for number, source in enumerate(sources, 1)
            for batch in read_token_batches(TokenSplit(source.artifact.local, "train"), 64)
            for row in batch.tokens_bt.tolist()
        }

    def token_losses(self, batch: TokenBatch) -> torch.Tensor:
        costs_b = torch.tensor([self.costs[tuple(row)] for row in batch.tokens_bt.tolist()])
        return (batch.targets_bt >= 0) * costs_b[:, None]


@pytest.mark.usefixtures("single_process")
def test_losses_by_source_are_of_its_own_sequences(tokens: Tokens, more: Tokens) -> None:
    with TokenStream(
        [TokenSplit(source.artifact.local, "train") for source in (tokens, more)],
        micro_batch_size=2,
        global_batch_size=8,
        order=StreamOrder(),
        worker=Worker(),
        mixture=Mixture([Phase(0, (Fraction(7, 10), Fraction(3, 10)))]),
    ) as stream:
        batches = iter(stream)
        for step in range(10):
            micro_batches = list(islice(batches, 4))
            trainer: Any = KnowsItsSources((tokens, more))
            found = source_losses(trainer, stream, step, micro_batches, ["tokens", "more"])
            assert found == {"tokens": 1.0, "more": 2.0}


def test_a_curriculum_changes_the_shares_at_its_steps(job_of: Callable[..., TrainJob], tmp_path: Path) -> None:
    job = job_of(tmp_path, curriculum=[{"from_step": 4, "weights": {"tokens": 0, "more": 1}}], max_repetition=100)
    assert job.mixture.counts(4 * 8) == [24, 8]
    assert job.mixture.counts(12 * 8) == [24, 72]


def test_a_source_that_would_be_read_too_often_is_refused(job_of: Callable[..., TrainJob], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"more holds \d+ sequences and would be read \d\.\d times in 12 steps"):
        job_of(tmp_path, max_repetition=0.01, weights={"tokens": 0, "more": 1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"data\.weights.* is missing: train reads 2 tokenize stages\. Set it to {tokens: 1, more: 1}\."),
        (
            {"weights": {"tokens": 1}},
            "found tokens, expected one weight for each tokenize stage in needs: tokens, more",
        ),
        ({"weights": {"tokens": 1, "wiki": 1}}, "found tokens, wiki, expected"),
    ],
)
def test_weights_name_the_sources(
    train_config: Callable[..., TrainStageConfig], tokens: Tokens, more: Tokens, data: dict[str, Any], message: str
) -> None:
    config = train_config(needs=("tokens", "more"), data=data)
    with pytest.raises(FieldError, match=message):
        TrainStage().check("train", config, TrainInputs((tokens, more)))


def test_weights_of_too_many_digits_are_refused(job_of: Callable[..., TrainJob], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer digits"):
        job_of(tmp_path, weights={"tokens": 0.123456789, "more": 1})
