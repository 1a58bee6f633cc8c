"""A training with bad batches planted in it: reported, left out, and the same after a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import UserError
from bmojo import BMojoLM
from data.shards import TokenBatch
from pipelines.stages.train import layout
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.job import TrainFacts
from pipelines.stages.train.layout import INCIDENTS
from pipelines.stages.train.stage import TrainInputs, make_job
from pipelines.stages.train.trainer import StepResult
from tests.pipelines.stages.train.plain_trainer import PlainTrainer, train_plainly
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of, weights

pytestmark = pytest.mark.usefixtures("single_process")

BAD_STEPS = (14, 17)


class PlantedTrainer(PlainTrainer):
    """Reads wrong targets in the steps BAD_STEPS: their loss is that of guessing, or worse."""

    num_steps = 0  # taken by whoever trained before

    def __init__(self, model: BMojoLM, config: TrainStageConfig) -> None:
        super().__init__(model, config)
        self.losses: list[float] = []

    def step(
        self, micro_batches: Sequence[TokenBatch], lr: float, loss_limit: torch.Tensor | None = None
    ) -> StepResult:
        self.num_steps += 1
        if self.num_steps in BAD_STEPS:
            micro_batches = [
                batch._replace(targets_bt=torch.where(batch.targets_bt >= 0, (batch.targets_bt * 7 + 31) % 300, -100))
                for batch in micro_batches
            ]
        return super().step(micro_batches, lr, loss_limit)


@pytest.fixture(scope="module")
def train(
    single_process: None,
    train_config: Callable[..., TrainStageConfig],
    tokens: Tokens,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[Path, TrainFacts, FileSink]]:
    """Train 20 steps with these spikes; with `resume`, from a copy of that run's checkpoint of step 15."""

    def run(resume: Path | None = None, **changes: Any) -> tuple[Path, TrainFacts, FileSink]:
        folder = tmp_path_factory.mktemp("spikes") / "train-0"
        sink = FileSink(folder.with_suffix(".jsonl"))
        fields = {"max_steps": 20, "checkpoint_every_steps": 5, "log_every_steps": 1, "lr": 1e-2} | changes
        fields["spikes"] = {"window": 8} | fields.get("spikes", {})
        job = make_job(train_config(**fields), TrainInputs((tokens,)), context_of(folder), sink)
        PlantedTrainer.num_steps = 0
        if resume is not None:
            shutil.copytree(resume / layout.step_dir(15), folder / layout.step_dir(15))
            shutil.copy(resume / INCIDENTS, folder / INCIDENTS)
            PlantedTrainer.num_steps = 15
            job = replace(job, resume_step=15)
        return folder, train_plainly(job, PlantedTrainer), sink

    return run


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / INCIDENTS).read_text().splitlines()]


def test_a_spike_is_told_at_its_step_with_the_samples_of_its_batch(
    train: Callable[..., tuple[Path, TrainFacts, FileSink]], tokens: Tokens, train_config: Callable[..., Any]
) -> None:
    folder, facts, sink = train()
    found = incidents(folder)
    assert [(each["kind"], each["step"], each["action"]) for each in found] == [
        ("spike", step, "report") for step in BAD_STEPS
    ]
    assert [step for step, _ in sink.points("train/spike_z")] == list(BAD_STEPS)
    assert facts.skipped_steps == ()
    for each in found:
        assert each["loss"] > each["limit"]
        assert each["z"] > 6
        assert {sample["source"] for sample in each["samples"]} == {"tokens"}
        assert len({sample["sample"] for sample in each["samples"]}) == train_config().global_batch_size


def test_reporting_changes_no_bit(train: Callable[..., tuple[Path, TrainFacts, FileSink]], tokens: Tokens) -> None:
    reporting, silent = train(), train(spikes={"window": 64})
    assert not (silent[0] / INCIDENTS).exists()
    assert reporting[1].history["train/loss"] == silent[1].history["train/loss"]


def test_a_spike_is_left_out_and_a_crash_after_it_changes_nothing(
    train: Callable[..., tuple[Path, TrainFacts, FileSink]],
) -> None:
    spikes = {"action": "skip"}
    folder, facts, _ = train(spikes=spikes, max_skipped_steps=2)
    assert facts.skipped_steps == BAD_STEPS
    assert [(each["step"], each["action"]) for each in incidents(folder)] == [(step, "skip") for step in BAD_STEPS]
    again, resumed, _ = train(resume=folder, spikes=spikes, max_skipped_steps=2)
    assert resumed.skipped_steps == BAD_STEPS
    assert resumed.history["train/loss"] == facts.history["train/loss"]
    assert incidents(again) == incidents(folder), "what is found again is written once"
    expected = weights(folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def test_one_spike_more_than_the_budget_ends_training(
    train: Callable[..., tuple[Path, TrainFacts, FileSink]],
) -> None:
    with pytest.raises(UserError, match=r"is a spike, z = .* at step 17 of 20, which was not applied; left out .* 14 "):
        train(spikes={"action": "skip"}, max_skipped_steps=1)
