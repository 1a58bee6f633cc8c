"""Trainings that go on from another one's checkpoint: a stable phase and its decays, and other batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import UserError
from pipelines.engine.stage import StageNode, StageResult
from pipelines.errors import FieldError
from pipelines.stages.train.checkpoint import newest_complete, read_state
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.job import History, TrainFacts
from pipelines.stages.train.stage import TrainInputs, TrainOutput, TrainStage, make_job, read_history
from pipelines.stages.train.start import check_start
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.stages.train.plain_trainer import train_plainly
from tests.pipelines.stages.train.training import SEQ_LEN, FileSink, Tokens, context_of, weights, write_tokens

MakeConfig = Callable[..., TrainStageConfig]
STABLE: dict[str, Any] = {
    "max_steps": 8, "warmup_steps": 2, "schedule": {"kind": "constant"}, "checkpoint_every_steps": 4,
    "keep_every_steps": 4, "keep_checkpoints": 1, "log_every_steps": 1, "lr": 1e-2, "validation_batches": 2,
}  # fmt: skip


def train(config: TrainStageConfig, inputs: TrainInputs, folder: Path) -> TrainFacts:
    return train_plainly(make_job(config, inputs, context_of(folder), FileSink(folder.with_suffix(".jsonl"))))


def node_of(config: TrainStageConfig, inputs: TrainInputs, folder: Path, steps: int) -> StageNode[TrainStage]:
    output = TrainOutput.model_construct(steps=steps, model="model")
    return StageNode("stable", TrainStage(), config, inputs, StageResult("a" * 64, ArtifactDir.at(folder), output))


@pytest.fixture(scope="module")
def stable(
    single_process: None, train_config: MakeConfig, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StageNode[TrainStage], TrainFacts]:
    """8 steps at the full rate."""
    folder = tmp_path_factory.mktemp("stable") / "train-0"
    config, inputs = train_config(**STABLE), TrainInputs((tokens,))
    facts = train(config, inputs, folder)
    return node_of(config, inputs, folder, 8), facts


def test_going_on_with_everything_is_the_longer_training_to_the_last_bit(
    stable: tuple[StageNode[TrainStage], TrainFacts], train_config: MakeConfig, tokens: Tokens, tmp_path: Path
) -> None:
    """A stage from step 4 with moments and data takes the steps 5 to 8 of the first one."""
    node, facts = stable
    start = {"step": 4, "moments": True, "continue_data": True}
    config = train_config(**STABLE | {"max_steps": 4, "warmup_steps": 0}, start=start)
    again = train(config, TrainInputs((tokens,), node), tmp_path / "train-0")
    assert [loss for _, loss in again.history["train/loss"]] == [loss for _, loss in facts.history["train/loss"][4:]]
    expected = weights(node.artifact.local)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "train-0").items())
    newest = newest_complete(ArtifactDir.at(tmp_path / "train-0"))
    assert newest is not None
    assert (newest.state.step, newest.state.num_samples, newest.state.optimizer_steps) == (4, 32, 8)
    assert newest.state.data["num_samples"] == 64


def test_two_decays_from_different_steps_of_a_stable_phase(
    stable: tuple[StageNode[TrainStage], TrainFacts], train_config: MakeConfig, tokens: Tokens, tmp_path: Path
) -> None:
    node, facts = stable
    found = {}
    for step in (4, 8):
        start = {"step": step, "moments": True, "continue_data": True}
        decay = {"max_steps": 3, "warmup_steps": 0, "schedule": {"kind": "linear"}, "min_lr_ratio": 0.0}
        config = train_config(**STABLE | decay, start=start)
        found[step] = train(config, TrainInputs((tokens,), node), tmp_path / f"train-{step}")
        assert found[step].history["train/lr"] == [(1, pytest.approx(2e-2 / 3)), (2, pytest.approx(1e-2 / 3)), (3, 0.0)]
    assert found[4].history["train/loss"][0][1] == facts.history["train/loss"][4][1], "before the first update"
    assert found[4].final_valid_loss != found[8].final_valid_loss


def test_weights_alone_begin_the_data_and_the_optimizer_anew(
    stable: tuple[StageNode[TrainStage], TrainFacts], train_config: MakeConfig, tokens: Tokens, tmp_path: Path
) -> None:
    node, _ = stable
    from_step = train_config(**STABLE | {"max_steps": 3}, start={"step": 8})
    at_end = train_config(**STABLE | {"max_steps": 3})
    one, other = (
        train(config, TrainInputs((tokens,), node), tmp_path / f"train-{number}")
        for number, config in enumerate((from_step, at_end))
    )
    assert one.history["train/loss"] == other.history["train/loss"], "step 8 is the final model"
    state = read_state(ArtifactDir.at(tmp_path / "train-0"), 3)
    assert (state.optimizer_steps, state.data["num_samples"]) == (3, 24)


def test_other_batches_and_windows_go_on_at_the_same_sample(
    stable: tuple[StageNode[TrainStage], TrainFacts],
    train_config: MakeConfig,
    tiny_model: dict[str, Any],
    tokens: Tokens,
    tmp_path: Path,
) -> None:
    node, _ = stable
    grown = {"global_batch_size": 16, "batch_size_warmup": [{"size": 8, "steps": 1}], "max_steps": 3, "warmup_steps": 0}
    longer = {"model": tiny_model | {"window_size": 64, "num_eidetic": 16}}
    config = train_config(**STABLE | grown | longer, start={"step": 4, "moments": True, "continue_data": True})
    again = train(config, TrainInputs((tokens,), node), tmp_path / "train-0")
    assert again.history["train/tokens"][-1][1] > 2 * again.history["train/tokens"][0][1]
    state = read_state(ArtifactDir.at(tmp_path / "train-0"), 3)
    assert (state.num_samples, state.data["num_samples"]) == (40, 32 + 40)


LONG: dict[str, Any] = {"max_steps": 3, "warmup_steps": 1}


def test_sequences_four_times_as_long_go_on_from_the_weights(
    stable: tuple[StageNode[TrainStage], TrainFacts], train_config: MakeConfig, tmp_path: Path
) -> None:
    node, _ = stable
    long = write_tokens(tmp_path, name="long", seq_len=4 * SEQ_LEN)
    started = train(train_config(**STABLE | LONG, start={"step": 4}), TrainInputs((long,), node), tmp_path / "train-0")
    untrained = train(train_config(**STABLE | LONG), TrainInputs((long,)), tmp_path / "train-1")
    (_, num_tokens), *_ = started.history["train/tokens"]
    assert 0.8 * 8 * 4 * SEQ_LEN < num_tokens <= 8 * 4 * SEQ_LEN
    assert started.initial_valid_loss is not None
    assert untrained.initial_valid_loss is not None
    assert started.initial_valid_loss < untrained.initial_valid_loss - 0.3, "it has learned something before"
    assert read_state(ArtifactDir.at(tmp_path / "train-0"), 3).optimizer_steps == 3
    with pytest.raises(FieldError, match="read different samples, by: needs"):
        check_start("long", train_config(start={"continue_data": True}), TrainInputs((long,), node))


@pytest.mark.slow
def test_growing_batches_and_starts_on_two_workers_of_deepspeed_are_those_of_one_process(
    ray_cluster: None, single_process: None, train_config: MakeConfig, tokens: Tokens, tmp_path: Path
) -> None:
    """The stage itself, three times: batches that grow; on from its step 4 with everything; longer, weights alone."""
    two: dict[str, Any] = {"resources": {"num_workers": 2}, "global_batch_size": 16}
    grown = train_config(**STABLE | two, batch_size_warmup=[{"size": 8, "steps": 4}])
    inputs = TrainInputs((tokens,))
    output = TrainStage().run(grown, inputs, context_of(tmp_path / "train-0"))
    history = read_history(ArtifactDir.at(tmp_path / "train-0"))
    alone = train(grown.with_workers(1), inputs, tmp_path / "alone-0")
    assert history["train/tokens"] == alone.history["train/tokens"], "the same samples in every step"
    assert losses(history) == pytest.approx(losses(alone.history), rel=1e-5)
    node = StageNode(
        "stable", TrainStage(), grown, inputs, StageResult("a" * 64, ArtifactDir.at(tmp_path / "train-0"), output)
    )

    start = {"step": 4, "moments": True, "continue_data": True}
    going_on = train_config(**STABLE | two | {"max_steps": 4, "warmup_steps": 0}, start=start)
    TrainStage().run(going_on, TrainInputs((tokens,), node), context_of(tmp_path / "train-1"))
    assert losses(read_history(ArtifactDir.at(tmp_path / "train-1"))) == losses(history)[4:]
    expected = weights(tmp_path / "train-0")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "train-1").items())

    long = TrainInputs((write_tokens(tmp_path, seq_len=4 * SEQ_LEN),), node)
    longer = train_config(**STABLE | two | LONG, start={"step": 8})
    TrainStage().run(longer, long, context_of(tmp_path / "train-2"))
    alone = train(longer.with_workers(1), long, tmp_path / "alone-2")
    assert losses(read_history(ArtifactDir.at(tmp_path / "train-2"))) == pytest.approx(losses(alone.history), rel=1e-5)


def losses(history: History) -> list[float]:
    return [loss for _, loss in history["train/loss"]]


def test_steps_that_are_not_kept_and_moments_that_do_not_fit_are_refused(
    stable: tuple[StageNode[TrainStage], TrainFacts], train_config: MakeConfig, tokens: Tokens, tmp_path: Path
) -> None:
    node, _ = stable
    alone, with_initial = TrainInputs((tokens,)), TrainInputs((tokens,), node)
    for inputs, changes, message in (
        (alone, {"start": {"step": 4}}, "needs names none. Add it"),
        (with_initial, {"start": {"step": 9}}, "trains for 8 steps"),
        (with_initial, {"start": {"step": 6}}, "keep_every_steps to a divisor of 6 .* checkpoint_every_steps=4"),
        (with_initial, {"start": {"moments": True}, "optimizer": {"kind": "muon"}}, "'stable' is trained by adamw"),
        (with_initial, {"start": {"continue_data": True}, "seed": 3}, "different samples, by: seed"),
    ):
        with pytest.raises(FieldError, match=message):
            check_start("decay", train_config(**changes), inputs)
    check_start("decay", train_config(start={"step": 4, "moments": True, "continue_data": True}), with_initial)
    with pytest.raises(UserError, match=r"It keeps: 4, 8\. Give one of these"):
        train(train_config(start={"step": 5}), with_initial, tmp_path / "train-0")
    wider = train_config(**STABLE, start={"step": 4})
    wider = wider.model_copy(update={"model": wider.model.replace(d_ff=64)})
    with pytest.raises(UserError, match=r"mlp.gate_up_proj.weight it holds .* only window, chunk and eidetic sizes"):
        train(wider, with_initial, tmp_path / "train-1")
