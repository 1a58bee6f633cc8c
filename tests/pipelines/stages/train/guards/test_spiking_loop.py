"""A training with bad batches planted in it: reported, left out, and the same after a crash."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import UserError
from bmojo import BMojoLM
from data.shards import TokenBatch, TokenSplit
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.stages.train import layout
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.job import TrainFacts
from pipelines.stages.train.layout import INCIDENTS
from pipelines.stages.train.stage import TrainInputs, make_job
from pipelines.stages.train.trainer import StepResult
from tests.pipelines.stages.train.plain_trainer import PlainTrainer, train_plainly
from tests.pipelines.stages.train.training import SEQ_LEN, FileSink, Tokens, context_of, weights

pytestmark = pytest.mark.usefixtures("single_process")

BAD_STEPS = (14, 17)


Train = Callable[..., tuple[Path, TrainFacts, FileSink]]


def key_of(micro_batches: Sequence[TokenBatch]) -> tuple[int, ...]:
    """Tells the batches of steps from one another."""
    return tuple(int((batch.tokens_bt * torch.arange(1, SEQ_LEN + 1)).sum()) for batch in micro_batches)


class PlantedTrainer(PlainTrainer):
    """Reads wrong targets in the batches of BAD_STEPS, whose loss is that of guessing; embeds NaN in NAN_STEPS."""

    steps: Mapping[tuple[int, ...], int] = {}  # number of the step by its batch
    nan_steps: tuple[int, ...] = ()

    def __init__(self, model: BMojoLM, config: TrainStageConfig) -> None:
        super().__init__(model, config)
        self.is_poisoned = False
        model.embedding.register_forward_hook(lambda *given: given[2] * (math.nan if self.is_poisoned else 1.0))

    def step(self, micro_batches: Sequence[TokenBatch], *args: Any, **options: Any) -> StepResult:
        step = self.steps[key_of(micro_batches)]
        if step in BAD_STEPS:
            micro_batches = [
                batch._replace(targets_bt=torch.where(batch.targets_bt >= 0, (batch.targets_bt * 7 + 31) % 300, -100))
                for batch in micro_batches
            ]
        self.is_poisoned = step in self.nan_steps
        result = super().step(micro_batches, *args, **options)
        self.is_poisoned = False
        return result


class LaggingTrainer(PlantedTrainer):
    """Leaves its norms on the device."""

    def step(self, micro_batches: Sequence[TokenBatch], *args: Any, **options: Any) -> StepResult:
        result = super().step(micro_batches, *args, **options)
        return result._replace(grad_norm=result.grad_norm.as_subclass(OnDevice))


class OnDevice(torch.Tensor):
    """A scalar that is as if on a GPU."""

    is_cpu = False


@pytest.fixture(scope="module")
def train(
    single_process: None,
    train_config: Callable[..., TrainStageConfig],
    tokens: Tokens,
    tmp_path_factory: pytest.TempPathFactory,
) -> Train:
    """Train 20 steps with these spikes; with `resume`, from a copy of that run's checkpoint of step 15."""

    def run(
        resume: Path | None = None,
        resume_step: int = 15,
        nan_steps: tuple[int, ...] = (),
        trainer: type[PlantedTrainer] = PlantedTrainer,
        **changes: Any,
    ) -> tuple[Path, TrainFacts, FileSink]:
        folder = tmp_path_factory.mktemp("spikes") / "train-0"
        sink = FileSink(folder.with_suffix(".jsonl"))
        fields = {"max_steps": 20, "checkpoint_every_steps": 5, "log_every_steps": 1, "lr": 1e-2} | changes
        fields["spikes"] = {"window": 8} | fields.get("spikes", {})
        config = train_config(**fields)
        job = make_job(config, TrainInputs((tokens,)), context_of(folder), sink)
        sizes = {"micro_batch_size": config.micro_batch_size, "global_batch_size": config.global_batch_size}
        split = TokenSplit(tokens.artifact.local, "train")
        with TokenStream([split], **sizes, order=StreamOrder(config.seed), worker=Worker()) as stream:
            batches = iter(stream)
            found = [key_of([next(batches) for _ in range(config.accumulation_steps)]) for _ in range(20)]
        PlantedTrainer.steps = {key: step for step, key in enumerate(found, 1)}
        PlantedTrainer.nan_steps = nan_steps
        assert len(PlantedTrainer.steps) == 20
        if resume is not None:
            shutil.copytree(resume / layout.step_dir(resume_step), folder / layout.step_dir(resume_step))
            shutil.copy(resume / INCIDENTS, folder / INCIDENTS)
            job = replace(job, resume_step=resume_step)
        return folder, train_plainly(job, trainer), sink

    return run


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / INCIDENTS).read_text().splitlines()]


def test_a_spike_is_told_at_its_step_with_the_samples_of_its_batch(
    train: Train, tokens: Tokens, train_config: Callable[..., Any]
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


@pytest.mark.ci
def test_reporting_changes_no_bit(train: Train, tokens: Tokens) -> None:
    reporting, silent = train(), train(spikes={"window": 64})
    assert not (silent[0] / INCIDENTS).exists()
    assert reporting[1].history["train/loss"] == silent[1].history["train/loss"]


def test_a_spike_is_left_out_and_a_crash_after_it_changes_nothing(
    train: Train,
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
    train: Train,
) -> None:
    with pytest.raises(UserError, match=r"is a spike, z = .* at step 17 of 20, which was not applied; left out .* 14 "):
        train(spikes={"action": "skip"}, max_skipped_steps=1)


def same(one: Path, other: Path) -> bool:
    """Whether the final models have the same bits."""
    expected = weights(one)
    return all(torch.equal(value, expected[name]) for name, value in weights(other).items())


@pytest.mark.ci
def test_going_back_and_leaving_out_the_spike_alone_is_skipping_it(train: Train) -> None:
    skipped = train(spikes={"action": "skip"}, max_skipped_steps=2)
    rewound = train(spikes={"action": "rewind", "rewind_before": 0}, max_skipped_steps=2)
    assert rewound[1].skipped_steps == BAD_STEPS
    assert [each["action"] for each in incidents(rewound[0])] == ["rewind", "rewind"]
    assert rewound[1].history["train/loss"] == skipped[1].history["train/loss"]
    assert same(rewound[0], skipped[0])


@pytest.mark.ci
def test_going_back_leaves_out_the_batch_before_too_as_if_it_had_never_been_taken(train: Train) -> None:
    rewound = train(spikes={"action": "rewind"}, max_skipped_steps=4)
    never_taken = train(spikes={"action": "skip"}, nan_steps=(13, 14, 16, 17), max_skipped_steps=4)
    assert rewound[1].skipped_steps == never_taken[1].skipped_steps == (13, 14, 16, 17)
    assert rewound[1].tokens_seen == never_taken[1].tokens_seen
    assert rewound[1].history["train/loss"] == never_taken[1].history["train/loss"]
    assert same(rewound[0], never_taken[0])


@pytest.mark.ci
def test_a_spike_that_is_noticed_late_is_gone_back_before_with_the_same_result(train: Train) -> None:
    at_once = train(spikes={"action": "rewind"}, max_skipped_steps=4)
    late = train(spikes={"action": "rewind"}, max_skipped_steps=4, trainer=LaggingTrainer, log_every_steps=100)
    assert late[1].skipped_steps == at_once[1].skipped_steps
    assert same(late[0], at_once[0])


@pytest.mark.ci
@pytest.mark.parametrize("resume_step", [10, 15])
def test_a_crash_after_going_back_changes_nothing(train: Train, resume_step: int) -> None:
    """Step 10 is before the first spike, whose decision is made again; step 15 has it in its checkpoint."""
    kept = {"keep_checkpoints": 10}
    unbroken = train(spikes={"action": "rewind"}, max_skipped_steps=4, **kept)
    resumed = train(
        resume=unbroken[0], resume_step=resume_step, spikes={"action": "rewind"}, max_skipped_steps=4, **kept
    )
    assert resumed[1].skipped_steps == unbroken[1].skipped_steps
    assert incidents(resumed[0]) == incidents(unbroken[0])
    assert same(resumed[0], unbroken[0])


@pytest.mark.ci
def test_without_a_checkpoint_to_go_back_to_the_spike_is_left_out(train: Train) -> None:
    skipped = train(spikes={"action": "skip"}, max_skipped_steps=2, checkpoint_every_steps=50)
    rewound = train(spikes={"action": "rewind"}, max_skipped_steps=2, checkpoint_every_steps=50)
    assert rewound[1].skipped_steps == BAD_STEPS
    assert same(rewound[0], skipped[0])
