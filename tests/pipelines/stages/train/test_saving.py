"""Checkpoints written beside training: complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bmojo.tensor_file import TensorFile
from pipelines.errors import InfrastructureError
from pipelines.faults import explained_disk
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU
from pipelines.stages.train.digests import added, digests_of
from pipelines.stages.train.launch import newest_checkpoint
from pipelines.stages.train.layout import complete_steps, step_dir
from pipelines.stages.train.pieces import Piece
from pipelines.stages.train.saving import Saver
from pipelines.stages.train.stage import TrainInputs, make_job
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.stages.train import forked
from tests.pipelines.stages.train.plain_trainer import train_plainly
from tests.pipelines.stages.train.saving_ranks import NUMEL, save_together, state_at, values_at
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of, weights

WRITE = checkpoints.write_rank_files
RNG = {"torch": torch.zeros(4, dtype=torch.uint8)}


@pytest.fixture
def artifact(tmp_path: Path) -> ArtifactDir:
    return ArtifactDir.at(tmp_path / "train-0")


@pytest.fixture
def saver(single_process: None, artifact: ArtifactDir) -> Iterator[Saver]:
    with Saver(artifact, checkpoints.Kept(2), CPU, lambda: None) as saver:
        yield saver


class HeldBack:
    """Has the writing of a checkpoint wait until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(checkpoints, "write_rank_files", self._write)

    def _write(self, *args: Any) -> Any:
        self.begun.set()
        self.may_go_on.wait()
        return WRITE(*args)


def save(saver: Saver, step: int, values: torch.Tensor) -> None:
    saver.save(state_at(step).model_copy(update={"num_workers": 1}), {"param/w": Piece(0, values)}, RNG)


def read(artifact: ArtifactDir, step: int) -> torch.Tensor:
    return checkpoints.Checkpoint(artifact.local / step_dir(step)).read("param/w", 0, 6)


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(
    saver: Saver, artifact: ArtifactDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, values = HeldBack(monkeypatch), torch.arange(6.0)
    save(saver, 1, values)
    held.begun.wait()
    values += 1
    saver.check()
    assert complete_steps(artifact) == []
    assert saver.saved_step is None
    held.may_go_on.set()
    save(saver, 2, values)  # waits for the first
    assert saver.saved_step == 1
    saver.wait()
    assert read(artifact, 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert read(artifact, 2).tolist() == [1, 2, 3, 4, 5, 6]


def test_training_that_waits_for_a_write_is_told_so_once(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = HeldBack(monkeypatch)
    save(saver, 1, torch.arange(6.0))
    held.begun.wait()
    threading.Timer(0.1, held.may_go_on.set).start()
    save(saver, 2, torch.arange(6.0))
    assert len([record for record in caplog.records if "checkpoint_every_steps" in record.message]) == 1
    save(saver, 3, torch.arange(6.0))
    saver.wait()
    save(saver, 4, torch.arange(6.0))  # waits for none
    assert len([record for record in caplog.records if "Training waited" in record.message]) == 1


def test_no_checkpoint_waits_for_memory_once_it_is_taken(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    saver.prepare({"param/w": Piece(0, torch.arange(6.0))})
    monkeypatch.setattr("pipelines.stages.train.device.host_memory", None)
    save(saver, 1, torch.arange(6.0))
    saver.wait()
    assert saver.saved_step == 1


def test_the_state_has_the_digests_of_what_was_copied(saver: Saver, artifact: ArtifactDir) -> None:
    save(saver, 1, torch.arange(6.0))
    saver.wait()
    state = checkpoints.Checkpoint(artifact.local / step_dir(1)).state
    assert state.digests == added([digests_of({"param/w": Piece(0, torch.arange(6.0))})])


def test_an_error_of_the_write_meets_training_at_its_next_step(
    saver: Saver, artifact: ArtifactDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(saver, 1, torch.arange(6.0))
    saver.wait()

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", "x")

    monkeypatch.setattr(checkpoints, "write_rank_files", fail)
    save(saver, 2, torch.arange(6.0))
    assert saver._thread is not None
    saver._thread.join()
    with pytest.raises(OSError, match="Input/output error"):
        saver.check()
    saver.check()  # it is told once
    assert (saver.saved_step, complete_steps(artifact)) == (1, [1])


def test_a_rank_without_room_fails_all_of_them_alike_and_the_next_checkpoint_is_written(tmp_path: Path) -> None:
    reports, exit_codes = save_together(tmp_path, ["", "disk", ""])
    artifact = ArtifactDir.at(tmp_path / "train-0")
    file = artifact.local / step_dir(2) / "tensors-00001-of-00002.safetensors"
    assert exit_codes == [0, 0]
    assert reports[0] == reports[1] == [1, ["OSError", errno.EFBIG, str(file)], 3]
    assert sorted(complete_steps(artifact)) == [1, 3]
    found = checkpoints.Checkpoint(artifact.local / step_dir(3))
    assert torch.equal(found.read("param/w", 0, NUMEL), values_at(3))


def test_a_rank_that_is_killed_while_it_writes_ends_the_others_and_loses_nothing_older(tmp_path: Path) -> None:
    reports, exit_codes = save_together(tmp_path, ["", "kill"])
    assert exit_codes == [0, -signal.SIGKILL]
    assert reports == [[1, "the other rank is gone"], None]
    newest = checkpoints.newest_complete(ArtifactDir.at(tmp_path / "train-0"))
    assert newest is not None
    assert newest.state.step == 1
    assert torch.equal(newest.read("param/w", 0, NUMEL), values_at(1))


@pytest.fixture(scope="module")
def config(train_config: Callable[..., TrainStageConfig]) -> TrainStageConfig:
    """12 steps with a checkpoint every 4."""
    return train_config(checkpoint_every_steps=4, log_every_steps=1, validation_batches=2)


@pytest.fixture(scope="module")
def straight(
    single_process: None, config: TrainStageConfig, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The final weights of an unbroken run."""
    folder = tmp_path_factory.mktemp("straight") / "train-0"
    train_plainly(make_job(config, TrainInputs((tokens,)), context_of(folder), FileSink(folder.with_suffix(".jsonl"))))
    return weights(folder)


def _train_until_killed(config_json: str, tokens: Tokens, folder: Path) -> None:
    """Train in a process of its own, which is killed half-way through the files of its second checkpoint."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    close, closed = TensorFile.close, 0

    def close_or_die(file: TensorFile) -> Any:
        nonlocal closed
        closed += 1
        if closed == 4:  # tensors and generators of the first, tensors of the second
            os.kill(os.getpid(), signal.SIGKILL)
        return close(file)

    TensorFile.close = close_or_die  # type: ignore[method-assign]  # in a process that ends
    config = TrainStageConfig.model_validate_json(config_json)
    train_plainly(make_job(config, TrainInputs((tokens,)), context_of(folder), FileSink(folder.with_suffix(".jsonl"))))


@pytest.mark.ci
def test_a_run_killed_while_it_writes_resumes_from_the_checkpoint_before_to_the_last_bit(
    straight: Mapping[str, torch.Tensor], config: TrainStageConfig, tokens: Tokens, tmp_path: Path, single_process: None
) -> None:
    folder = tmp_path / "train-0"
    process = forked.context().Process(target=_train_until_killed, args=(config.model_dump_json(), tokens, folder))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    artifact = ArtifactDir.at(folder)
    assert artifact.exists(step_dir(8)), "it had begun"
    newest = newest_checkpoint(artifact)
    assert newest is not None
    assert newest.state.step == 4
    job = make_job(config, TrainInputs((tokens,)), context_of(folder), FileSink(tmp_path / "again.jsonl"))
    train_plainly(replace(job, resume_step=4))
    assert weights(folder).keys() == straight.keys()
    assert all(torch.equal(value, straight[name]) for name, value in weights(folder).items())
    assert complete_steps(artifact) == [8, 12]


def test_a_full_disk_ends_training_as_a_fault_of_the_machine(
    config: TrainStageConfig, tokens: Tokens, tmp_path: Path, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(artifact: ArtifactDir, step: int, *args: Any) -> Any:
        if step == 8:
            raise OSError(errno.ENOSPC, "No space left on device", "tensors")
        return WRITE(artifact, step, *args)

    monkeypatch.setattr(checkpoints, "write_rank_files", fill)
    job = make_job(config, TrainInputs((tokens,)), context_of(tmp_path / "train-0"), FileSink(tmp_path / "m.jsonl"))
    with pytest.raises(InfrastructureError, match=r"tensors: No space left on device\. Make room"), explained_disk():
        train_plainly(job)
    assert complete_steps(job.artifact) == [4]
