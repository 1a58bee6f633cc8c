"""The training loop with a trainer of a few lines instead of a backend: what the protocol gives it is enough."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from base.errors import UserError
from bmojo import BMojoLM
from bmojo.checkpoint_io import load_pretrained, weight_files
from data.shards import TokenBatch
from kernels.operator import OPERATORS
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train import layout
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.optimizers.config import TransferConfig
from pipelines.stages.train.pieces import Read
from pipelines.stages.train.resuming import ResumeReport
from pipelines.stages.train.stage import TrainInputs, make_job
from pipelines.stages.train.start import Start
from pipelines.stages.train.trainer import StepResult
from pipelines.stages.train.weights import build_model, model_in_parts
from tests.pipelines.stages.train.plain_trainer import PlainTrainer, train_plainly
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
    final = weights(straight.folder)
    assert newest.sizes().keys() == {f"{p}/{name}" for p in ("param", "exp_avg", "exp_avg_sq") for name in final}
    for name, value in final.items():
        assert torch.equal(newest.read(f"param/{name}", 0, value.numel()), value.flatten())


def resumed_job(straight: Trained, tokens: Tokens, tmp_path: Path) -> TrainJob:
    """The same training elsewhere, from its checkpoint of step 6."""
    folder = tmp_path / "train-0"
    shutil.copytree(straight.folder / layout.step_dir(6), folder / layout.step_dir(6))
    sink = FileSink(tmp_path / "metrics.jsonl")
    return replace(make_job(straight.job.config, TrainInputs((tokens,)), context_of(folder), sink), resume_step=6)


def test_a_resumed_run_ends_as_the_unbroken_one_to_the_last_bit(
    straight: Trained, tokens: Tokens, tmp_path: Path
) -> None:
    job = resumed_job(straight, tokens, tmp_path)
    facts = train_plainly(job)
    assert facts.history["train/loss"] == straight.facts.history["train/loss"]
    assert facts.final_valid_loss == straight.facts.final_valid_loss
    expected = weights(straight.folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights(job.artifact.local).items())


class OnDevice(torch.Tensor):
    """A scalar that is as if on a GPU: `reads` counts who waited for it."""

    is_cpu = False
    reads = 0

    def tolist(self) -> list[list[float]]:
        OnDevice.reads += 1
        found: list[list[float]] = self.as_subclass(torch.Tensor).tolist()
        return found


class LaggingTrainer(PlainTrainer):
    """Leaves its norms on the device."""

    def step(self, micro_batches: Sequence[TokenBatch], *args: Any, **options: Any) -> StepResult:
        result = super().step(micro_batches, *args, **options)
        return result._replace(grad_norm=result.grad_norm.as_subclass(OnDevice))


class RuinedTrainer(LaggingTrainer):
    """Its tenth step is not finite."""

    def __init__(self, model: BMojoLM, config: TrainStageConfig) -> None:
        super().__init__(model, config)
        self.num_steps = 0

    def step(self, micro_batches: Sequence[TokenBatch], *args: Any, **options: Any) -> StepResult:
        self.num_steps += 1
        if self.num_steps < 10:
            return super().step(micro_batches, *args, **options)
        norm = torch.tensor(math.nan if self.num_steps == 10 else 1.0)
        return StepResult(torch.ones((), dtype=torch.float64), torch.tensor(1), norm.as_subclass(OnDevice))


def test_a_trainer_that_leaves_its_results_on_the_device_is_waited_for_where_a_point_is_due(
    straight: Trained, tokens: Tokens, tmp_path: Path
) -> None:
    config = straight.job.config.model_copy(update={"log_every_steps": 5})
    sink = FileSink(tmp_path / "metrics.jsonl")
    job = make_job(config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), sink)
    OnDevice.reads = 0
    facts = train_plainly(job, LaggingTrainer)
    steps = (1, 5, 10, 12)
    assert OnDevice.reads == len({*steps, 6})  # and before the checkpoint
    for name in ("train/loss", "train/grad_norm", "train/tokens"):
        assert facts.history[name] == [point for point in straight.facts.history[name] if point[0] in steps]
    assert facts.tokens_seen == straight.facts.tokens_seen
    assert facts.final_valid_loss == straight.facts.final_valid_loss
    expected = weights(straight.folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "train-0").items())


def test_a_step_that_was_not_finite_is_named_when_the_device_is_waited_for(
    straight: Trained, tokens: Tokens, tmp_path: Path
) -> None:
    config = straight.job.config.model_copy(update={"log_every_steps": 100})
    sink = FileSink(tmp_path / "metrics.jsonl")
    job = make_job(config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), sink)
    with pytest.raises(UserError, match=r"not finite at step 10 of 12, which was not applied.*step-00000006"):
        train_plainly(job, RuinedTrainer)
    assert layout.complete_steps(job.artifact) == [6]


class PoisonedTrainer(PlainTrainer):
    """Embeds NaN in steps 4 and 9."""

    num_steps = 0  # taken by whoever trained before

    def __init__(self, model: BMojoLM, config: TrainStageConfig) -> None:
        super().__init__(model, config)
        model.embedding.register_forward_hook(lambda *given: given[2] * (math.nan if self.is_poisoned else 1.0))
        self.is_poisoned = False

    def step(self, micro_batches: Sequence[TokenBatch], *args: Any, **options: Any) -> StepResult:
        self.num_steps += 1
        self.is_poisoned = self.num_steps in (4, 9)
        result = super().step(micro_batches, *args, **options)
        self.is_poisoned = False
        return result


class PoisonedLaggingTrainer(PoisonedTrainer):
    """Leaves its norms on the device."""

    def step(self, micro_batches: Sequence[TokenBatch], *args: Any, **options: Any) -> StepResult:
        result = super().step(micro_batches, *args, **options)
        return result._replace(grad_norm=result.grad_norm.as_subclass(OnDevice))


@pytest.fixture(scope="module")
def skipping(
    single_process: None, config: TrainStageConfig, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Of 12 steps two are left out."""
    folder = tmp_path_factory.mktemp("skipping") / "train-0"
    sink = FileSink(folder.with_suffix(".jsonl"))
    allowing = config.model_copy(update={"max_skipped_steps": 2})
    job = make_job(allowing, TrainInputs((tokens,)), context_of(folder), sink)
    return Trained(folder, job, train_plainly(job, PoisonedTrainer))


def test_steps_that_are_not_finite_are_left_out_within_the_budget(skipping: Trained, straight: Trained) -> None:
    facts = skipping.facts
    assert facts.skipped_steps == (4, 9)
    assert facts.history["train/skipped_steps"] == [(4, 1), (9, 2)]
    taken = [step for step in range(1, 13) if step not in facts.skipped_steps]
    assert [step for step, _ in facts.history["train/loss"]] == taken
    assert [step for step, _ in facts.history["train/grad_norm"]] == taken
    assert facts.history["train/loss"][:3] == straight.facts.history["train/loss"][:3]
    assert facts.tokens_seen < straight.facts.tokens_seen
    newest = checkpoints.newest_complete(skipping.job.artifact)
    assert newest is not None
    assert (newest.state.step, newest.state.optimizer_steps, newest.state.skipped_steps) == (12, 10, [4, 9])


def test_a_run_that_left_steps_out_resumes_to_the_last_bit(
    skipping: Trained, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "train-0"
    shutil.copytree(skipping.folder / layout.step_dir(6), folder / layout.step_dir(6))
    sink = FileSink(tmp_path / "metrics.jsonl")
    job = replace(make_job(skipping.job.config, TrainInputs((tokens,)), context_of(folder), sink), resume_step=6)
    monkeypatch.setattr(PoisonedTrainer, "num_steps", 6)
    facts = train_plainly(job, PoisonedTrainer)
    assert facts.skipped_steps == (4, 9)
    assert facts.tokens_seen == skipping.facts.tokens_seen
    for name in ("train/loss", "train/skipped_steps"):
        assert facts.history[name] == skipping.facts.history[name]
    expected = weights(skipping.folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())


def test_steps_left_out_are_noticed_late_with_the_same_result(
    skipping: Trained, tokens: Tokens, tmp_path: Path
) -> None:
    config = skipping.job.config.model_copy(update={"log_every_steps": 100})
    sink = FileSink(tmp_path / "metrics.jsonl")
    job = make_job(config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), sink)
    facts = train_plainly(job, PoisonedLaggingTrainer)
    assert facts.skipped_steps == (4, 9)
    assert facts.tokens_seen == skipping.facts.tokens_seen
    expected = weights(skipping.folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "train-0").items())


def test_one_step_more_than_the_budget_ends_training_and_names_them_all(
    skipping: Trained, tokens: Tokens, tmp_path: Path
) -> None:
    config = skipping.job.config.model_copy(update={"max_skipped_steps": 1})
    job = make_job(
        config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), FileSink(tmp_path / "metrics.jsonl")
    )
    with pytest.raises(UserError, match=r"at step 9 of 12, which was not applied; left out before: 4 .*step-00000006"):
        train_plainly(job, PoisonedTrainer)


def test_a_resume_reports_what_it_put_back_and_that_it_is_what_was_written(
    straight: Trained, tokens: Tokens, tmp_path: Path
) -> None:
    job = resumed_job(straight, tokens, tmp_path)
    train_plainly(job)
    train_plainly(job)
    assert layout.resume_reports(job.artifact) == [f"resumes/000{n}-step-00000006.json" for n in (1, 2)]
    written = checkpoints.Checkpoint(job.artifact.local / layout.step_dir(6))
    report = ResumeReport.model_validate(job.artifact.read_json("resumes/0001-step-00000006.json"))
    assert (report.step, report.checkpoint, report.optimizer_steps) == (6, layout.step_dir(6), 6)
    assert report.written_by == report.read_by
    assert report.read_by.num_workers == 1
    assert report.num_samples == 6 * straight.job.config.global_batch_size
    assert (report.num_tensors, report.num_elements) == (len(written.sizes()), sum(written.sizes().values()))
    assert report.random_generators
    assert report.compared == "digests of all elements"
    assert report.digests == written.state.digests
    assert report.digests.keys() == written.sizes().keys()


class ForgetfulTrainer(PlainTrainer):
    """Loses one value of a moment when it loads."""

    def load(self, read: Read, num_steps: int) -> None:
        super().load(read, num_steps)
        self.tensor("exp_avg/norm.weight").view(-1)[3] += 1e-7


def test_a_tensor_that_is_not_what_was_written_is_named(straight: Trained, tokens: Tokens, tmp_path: Path) -> None:
    job = resumed_job(straight, tokens, tmp_path)
    with pytest.raises(RuntimeError, match=r"exp_avg/norm\.weight is not what .*step-00000006 holds.* \(1 of \d+"):
        train_plainly(job, ForgetfulTrainer)
    assert layout.resume_reports(job.artifact) == []


def test_a_large_final_model_is_in_several_files_and_the_same(
    straight: Trained, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmojo.checkpoint_io.SHARD_BYTES", 100_000)
    folder = tmp_path / "train-0"
    shutil.copytree(straight.folder / layout.step_dir(12), folder / layout.step_dir(12))
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_text("of an attempt that was cut short")
    sink = FileSink(tmp_path / "metrics.jsonl")
    job = replace(make_job(straight.job.config, TrainInputs((tokens,)), context_of(folder), sink), resume_step=12)
    train_plainly(job)
    assert len(weight_files(folder / "model")) > 2
    assert not (folder / "model" / "model.safetensors").exists()
    loaded, expected = load_pretrained(folder / "model"), load_pretrained(straight.folder / "model")
    assert all(torch.equal(value, expected.get_parameter(name)) for name, value in loaded.named_parameters())


def test_a_model_in_parts_has_the_values_of_the_whole_one(straight: Trained, tokens: Tokens, tmp_path: Path) -> None:
    """From new weights, also of another size than the rates were chosen at, and from another stage's."""
    job = straight.job
    transfer = TransferConfig(base_d_model=16, base_num_layers=1)
    scaled = replace(job, config=job.config.model_copy(update={"transfer": transfer}))
    assert not torch.equal(build_model(scaled).norm.weight, build_model(job).norm.weight)
    for given in (job, scaled, replace(job, start=Start(job.artifact))):
        model, parts = model_in_parts(given)
        list(parts)
        expected = build_model(given)
        assert all(torch.equal(value, expected.get_parameter(name)) for name, value in model.named_parameters())
    wider = replace(job, model=job.model.replace(d_ff=96), start=Start(job.artifact))
    with pytest.raises(UserError, match=r"train-0/model do not fit train\.model: blocks\.0\.mlp\S+ is .* expected"):
        list(model_in_parts(wider)[1])
