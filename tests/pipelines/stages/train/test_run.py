"""Training end to end under Ray Train: the stage, a worker killed with SIGKILL, other numbers of workers, bad luck."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch

from base.errors import UserError
from bmojo.checkpoint_io import load_pretrained
from data.shards import TokenBatch
from pipelines.engine.stage import StageNode, StageResult
from pipelines.errors import InfrastructureError, LostError
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train import layout
from pipelines.stages.train.backends.config import DeepSpeedConfig
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.divergence import is_ruined
from pipelines.stages.train.job import TrainFacts
from pipelines.stages.train.launch import run_training
from pipelines.stages.train.stage import TrainInputs, TrainOutput, TrainStage, _warn_if_worse, make_job
from pipelines.stages.train.trainer import StepResult
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import read_events
from tests.pipelines.stages.train.plain_trainer import PlainTrainer, train_plainly
from tests.pipelines.stages.train.training import SEQ_LEN, FileSink, Tokens, context_of, weights

pytestmark = pytest.mark.ci

MakeConfig = Callable[..., TrainStageConfig]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture(scope="module")
def two_workers(train_config: MakeConfig) -> TrainStageConfig:
    """12 steps on 2 workers with a checkpoint every 6."""
    return train_config(
        resources={"num_workers": 2}, checkpoint_every_steps=6, log_every_steps=1, validation_batches=2, lr=1e-2
    )


@dataclass(frozen=True)
class Straight:
    """An unbroken run."""

    folder: Path
    output: TrainOutput
    history: dict[str, list[list[float]]]

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(int(step), value) for step, value in self.history[name]]


@pytest.fixture(scope="module")
def straight(
    ray_cluster: None,
    two_workers: TrainStageConfig,
    tokens: Tokens,
    tmp_path_factory: pytest.TempPathFactory,
) -> Straight:
    folder = tmp_path_factory.mktemp("straight") / "train-0"
    context = context_of(folder)
    output = TrainStage().run(two_workers, TrainInputs((tokens,)), context)
    return Straight(folder, output, json.loads((folder / "history.json").read_text()))


def test_stage_trains_and_reports_facts(straight: Straight, tokens: Tokens) -> None:
    output = straight.output
    assert output.steps == 12
    assert output.vocab_size == 320
    assert output.initial_valid_loss is not None
    assert output.final_valid_loss is not None
    assert output.final_valid_loss < output.initial_valid_loss - 0.5
    assert 12 * 8 * SEQ_LEN * 0.9 < output.tokens_seen <= 12 * 8 * SEQ_LEN
    assert 0 < output.mfu < 1
    assert load_pretrained(straight.folder / output.model).config.vocab_size == 320


def test_curves_reach_the_journal_and_the_history(straight: Straight) -> None:
    lines = (straight.folder.with_suffix(".journal") / "train.workers.jsonl").read_text()
    for name in ("train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/tokens_per_s", "train/mfu"):
        assert name in lines
        assert [step for step, _ in straight.series(name)] == list(range(1, 13))
    assert [step for step, _ in straight.series("valid/loss")] == [0, 12]
    assert straight.series("valid/loss")[-1][1] == straight.output.final_valid_loss


def test_the_paths_that_operators_took_reach_the_journal(straight: Straight) -> None:
    journal = straight.folder.with_suffix(".journal") / "train.workers.jsonl"
    tags = {name: text for event, _ in read_events(journal) for name, text in event.get("tags", {}).items()}
    assert "cpp: float32 or float64 on the CPU" in tags["bmojo.path.memory_attention"]


def test_checkpoints_are_complete_and_hold_everything(straight: Straight) -> None:
    artifact = ArtifactDir.at(straight.folder)
    assert artifact.listdir(layout.CHECKPOINTS) == ["step-00000006", "step-00000012"]
    newest = checkpoints.newest_complete(artifact)
    assert newest is not None
    assert newest.state.step == newest.state.optimizer_steps == 12
    assert newest.state.data["num_samples"] == 12 * 8
    final = weights(straight.folder)
    for name, value in final.items():
        assert torch.equal(newest.read(f"param/{name}", 0, value.numel()), value.flatten())


def test_run_killed_after_a_checkpoint_ends_as_the_unbroken_one_to_the_last_bit(
    straight: Straight, two_workers: TrainStageConfig, tokens: Tokens, tmp_path: Path
) -> None:
    sink = FileSink(tmp_path / "metrics.jsonl", kill_at_step=8)
    job = make_job(two_workers, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), sink)
    with pytest.raises(LostError, match="Training lost a worker"):
        run_training(job)
    assert sink.path.with_suffix(".killed").exists()
    assert TrainStage().mark(two_workers, job.artifact) == 6
    facts = run_training(job, attempt=2)
    losses = sink.points("train/loss")
    assert [step for step, _ in losses] == [*range(1, 9), *range(1, 13)], "replayed to step 6, then trained again"
    assert losses[:8] == straight.series("train/loss")[:8]
    assert losses[8:] == straight.series("train/loss")
    assert facts.final_valid_loss == straight.output.final_valid_loss
    assert facts.initial_valid_loss == straight.output.initial_valid_loss
    assert {k: v.tolist() for k, v in weights(tmp_path / "train-0").items()} == {
        k: v.tolist() for k, v in weights(straight.folder).items()
    }


def go_on_from_step_6(
    straight: Straight, config: TrainStageConfig, tokens: Tokens, folder: Path
) -> tuple[TrainFacts, FileSink]:
    """Train from a copy of the unbroken run's checkpoint at step 6."""
    target = folder / "train-0" / layout.step_dir(6)
    shutil.copytree(straight.folder / layout.step_dir(6), target)
    sink = FileSink(folder / "metrics.jsonl")
    return run_training(make_job(config, TrainInputs((tokens,)), context_of(folder / "train-0"), sink)), sink


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"num_workers": 1}, {"num_workers": 4}, {"zero_stage": 3}, {"zero_stage": 2}])
def test_other_number_of_workers_or_zero_stage_goes_on_with_the_same_losses(
    straight: Straight,
    two_workers: TrainStageConfig,
    tokens: Tokens,
    tmp_path: Path,
    changes: dict[str, int],
) -> None:
    num_workers = changes.get("num_workers", 2)
    resources = two_workers.resources.model_copy(update={"num_workers": num_workers})
    backend = DeepSpeedConfig(kind="deepspeed", zero_stage=changes.get("zero_stage", 1))
    config = two_workers.model_copy(update={"resources": resources, "backend": backend})
    facts, sink = go_on_from_step_6(straight, config, tokens, tmp_path)
    losses = dict(sink.points("train/loss"))
    expected = dict(straight.series("train/loss"))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert facts.tokens_seen == straight.output.tokens_seen
    assert facts.final_valid_loss == pytest.approx(straight.output.final_valid_loss, rel=1e-4)


def test_another_backend_resumes_a_checkpoint_of_deepspeed_with_the_same_losses(
    straight: Straight, two_workers: TrainStageConfig, tokens: Tokens, tmp_path: Path, single_process: None
) -> None:
    shutil.copytree(straight.folder / layout.step_dir(6), tmp_path / "train-0" / layout.step_dir(6))
    config = two_workers.model_copy(update={"resources": two_workers.resources.model_copy(update={"num_workers": 1})})
    job = make_job(
        config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), FileSink(tmp_path / "metrics.jsonl")
    )
    facts = train_plainly(replace(job, resume_step=6))
    assert dict(facts.history["train/loss"]) == pytest.approx(dict(straight.series("train/loss")), rel=1e-4)


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    straight: Straight, two_workers: TrainStageConfig, tokens: Tokens, tmp_path: Path
) -> None:
    folder = tmp_path / "train-0"
    shutil.copytree(straight.folder / layout.CHECKPOINTS, folder / layout.CHECKPOINTS)
    damaged = folder / layout.step_dir(12) / "tensors-00001-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    sink = FileSink(tmp_path / "metrics.jsonl")
    facts = run_training(make_job(two_workers, TrainInputs((tokens,)), context_of(folder), sink))
    assert facts.final_valid_loss == straight.output.final_valid_loss
    checkpoints.verify(folder / layout.step_dir(12))


@pytest.mark.slow
def test_diverging_run_stops_with_advice_and_is_not_retried(
    straight: Straight, two_workers: TrainStageConfig, tokens: Tokens, tmp_path: Path
) -> None:
    config = two_workers.model_copy(update={"lr": 1e30, "grad_clip": 0.0, "warmup_steps": 0})
    with pytest.raises(UserError, match=r"not finite at step \d+ of 12.*Try a lower lr \(now 1e\+30\)"):
        run_training(
            make_job(
                config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), FileSink(tmp_path / "metrics.jsonl")
            )
        )


@dataclass(frozen=True)
class FlippingSink(FileSink):
    """Flips the lowest bit of a weight of its own process, rank 0, after step 8, once."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().log_metrics(step, values)
        flipped = self.path.with_suffix(".flipped")
        if step == 8 and not flipped.exists():
            flipped.touch()
            (trainer,) = [found for found in gc.get_objects() if type(found).__name__ == "DeepSpeedTrainer"]
            trainer.replicas()["param/embedding.weight"].view(-1)[:1].view(torch.int32).bitwise_xor_(1)


@pytest.mark.slow
def test_a_bit_flipped_in_one_worker_ends_the_attempt_and_the_next_one_is_none_the_worse(
    straight: Straight, two_workers: TrainStageConfig, tokens: Tokens, tmp_path: Path
) -> None:
    """Without ZeRO: with it each update gathers whole parameters again, which takes the flipped one away."""
    unsharded = {"backend": DeepSpeedConfig(kind="deepspeed", zero_stage=0), "check_replicas_every_steps": 3}
    config = two_workers.model_copy(update=unsharded)
    sink = FlippingSink(tmp_path / "metrics.jsonl")
    job = make_job(config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), sink)
    with pytest.raises(InfrastructureError, match=r"step 9.*param/embedding\.weight on rank.*checkpoint of step 6"):
        run_training(job)
    assert sink.path.with_suffix(".flipped").exists()
    facts = run_training(job, attempt=2)
    assert facts.final_valid_loss == pytest.approx(straight.output.final_valid_loss, rel=1e-5)


@pytest.mark.slow
def test_continued_pretraining_starts_from_the_other_stages_weights(
    straight: Straight, two_workers: TrainStageConfig, tokens: Tokens, tmp_path: Path
) -> None:
    result = StageResult("1" * 64, ArtifactDir.at(straight.folder), straight.output)
    first = StageNode("first", TrainStage(), two_workers, TrainInputs((tokens,)), result)
    sink = FileSink(tmp_path / "metrics.jsonl")
    job = make_job(two_workers, TrainInputs((tokens,), initial=first), context_of(tmp_path / "train-0"), sink)
    facts = run_training(replace(job, num_steps=3))
    assert facts.initial_valid_loss == straight.output.final_valid_loss


def test_more_workers_than_the_cluster_holds_are_waited_for_and_then_an_error(
    ray_cluster: None, two_workers: TrainStageConfig, tokens: Tokens, tmp_path: Path
) -> None:
    resources = two_workers.resources.model_copy(
        update={"num_workers": 4, "cpus_per_worker": 3.0, "placement_timeout_s": 2.0}
    )
    config = two_workers.model_copy(update={"resources": resources})
    with pytest.raises(UserError, match=r"4 training workers ask for 3 CPU each.*room for 1"):
        run_training(
            make_job(config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), FileSink(tmp_path / "m"))
        )


def seven_steps(config: TrainStageConfig, lr: float) -> TrainStageConfig:
    """As two_workers, with a seventh step, the last one, at this learning rate."""
    return config.model_copy(update={"max_steps": 7, "warmup_steps": 0, "lr": lr, "min_lr_ratio": 1.0})


def assert_diverges(train: Callable[[Path], object], straight: Straight, folder: Path, what: str) -> None:
    """`train` in a folder that holds a checkpoint at step 6 says so, keeps that one and makes no model."""
    shutil.copytree(straight.folder / layout.step_dir(6), folder / layout.step_dir(6))
    with pytest.raises(
        UserError, match=rf"Training diverged: {what} step 7 of 7.*last good checkpoint.*Try a lower lr"
    ):
        train(folder)
    artifact = ArtifactDir.at(folder)
    assert artifact.listdir(layout.CHECKPOINTS) == ["step-00000006"]
    assert not artifact.exists("model")


class OverflowingTrainer(PlainTrainer):
    """Every step leaves infinity in a weight."""

    def step(self, micro_batches: Sequence[TokenBatch], *args: Any, **options: Any) -> StepResult:
        result = super().step(micro_batches, *args, **options)
        self.tensor(next(iter(self.shapes))).view(-1)[0] = math.inf
        return result


@pytest.mark.parametrize(
    ("trainer", "lr", "what"),
    [
        pytest.param(PlainTrainer, 1e3, "the validation loss is .* after", id="finite"),
        pytest.param(OverflowingTrainer, 1e-2, ".* is not finite after", id="overflow"),
    ],
)
def test_a_last_step_that_ruins_the_weights_ends_as_diverged_and_keeps_the_checkpoint_before(
    trainer: type[PlainTrainer],
    lr: float,
    what: str,
    two_workers: TrainStageConfig,
    tokens: Tokens,
    straight: Straight,
    tmp_path: Path,
    single_process: None,
) -> None:
    resources = two_workers.resources.model_copy(update={"num_workers": 1})
    config = seven_steps(two_workers, lr).model_copy(update={"resources": resources})

    def train(folder: Path) -> None:
        job = make_job(config, TrainInputs((tokens,)), context_of(folder), FileSink(tmp_path / "metrics.jsonl"))
        train_plainly(replace(job, resume_step=6), trainer)

    assert_diverges(train, straight, tmp_path / "train-0", what)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e3, 1e39], ids=["finite", "overflow"])
def test_the_stage_ends_as_diverged_when_the_last_step_ruins_the_weights(
    lr: float, two_workers: TrainStageConfig, tokens: Tokens, straight: Straight, tmp_path: Path
) -> None:
    def train(folder: Path) -> None:
        TrainStage().run(seven_steps(two_workers, lr), TrainInputs((tokens,)), context_of(folder))

    assert_diverges(train, straight, tmp_path / "train-0", ".*")


@pytest.mark.parametrize(("loss", "expected"), [
    (math.nan, True), (math.inf, True), (115232.97, True), (12.3, True), (12.0, False), (6.1, False), (0.0, False),
])  # fmt: skip
def test_a_loss_far_worse_than_guessing_is_that_of_ruined_weights(loss: float, expected: bool) -> None:
    assert is_ruined(loss, vocab_size=450) is expected  # guessing: ln 450 = 6.11 nats


def test_a_model_that_training_made_far_worse_is_warned_about(
    straight: Straight, two_workers: TrainStageConfig, caplog: pytest.LogCaptureFixture
) -> None:
    facts = TrainFacts(
        steps=1, tokens_seen=1, final_train_loss=6.0, initial_valid_loss=6.09, final_valid_loss=115232.97, num_params=1,
        train_time_s=1.0, tokens_per_s=1.0, mfu=0.1, history={},
    )  # fmt: skip
    _warn_if_worse(facts, two_workers)
    assert "training made the model worse: validation loss 6.09 before the first step, 1.152e+05" in caplog.text
    caplog.clear()
    _warn_if_worse(facts.model_copy(update={"final_valid_loss": 5.0}), two_workers)
    assert not caplog.records
