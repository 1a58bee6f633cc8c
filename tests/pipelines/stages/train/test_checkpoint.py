"""The checkpoint format: complete or absent, verified before use, portable, never unpickled."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

from base.sealed import dumps, seal
from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train import device, layout
from pipelines.stages.train.pieces import Piece
from pipelines.storage.artifact import ArtifactDir

PREFIXES = ("param", "exp_avg", "exp_avg_sq")


def state(step: int, num_workers: int = 2) -> checkpoints.TrainingState:
    return checkpoints.TrainingState(
        step=step,
        num_tokens=step * 100,
        num_samples=step * 8,
        optimizer_steps=step,
        num_workers=num_workers,
        data={"epoch": 0},
        train_loss=1.25,
        initial_valid_loss=None,
        train_time_s=2.0,
        history={"train/loss": [(1, 2.5), (step, 1.25)]},
        versions={"torch": torch.__version__},
    )


def values_of(prefix: str, step: int) -> torch.Tensor:
    return torch.arange(6.0) + step + 10 * PREFIXES.index(prefix)


def write(artifact: ArtifactDir, step: int, num_workers: int = 2) -> Path:
    """A checkpoint of one parameter of 6 elements, of which each rank wrote as many."""
    entries = {}
    for rank in range(num_workers):
        pieces = {
            f"{prefix}/w": Piece(start, values_of(prefix, step)[start : start + 6 // num_workers])
            for prefix in PREFIXES
            for start in (rank * 6 // num_workers,)
        }
        entries |= checkpoints.write_rank_files(artifact, step, rank, num_workers, pieces, device.rng_state(device.CPU))
    checkpoints.complete(artifact, state(step, num_workers), entries)
    return artifact.local / layout.step_dir(step)


@pytest.fixture
def artifact(tmp_path: Path) -> ArtifactDir:
    return ArtifactDir.at(tmp_path / "train-0123")


def test_what_was_written_is_read_back(artifact: ArtifactDir) -> None:
    write(artifact, 100)
    found = checkpoints.newest_complete(artifact)
    assert found is not None
    assert found.directory.name == "step-00000100"
    assert found.state == state(100)
    assert found.sizes() == dict.fromkeys(["exp_avg/w", "exp_avg_sq/w", "param/w"], 6)
    assert found.read("param/w", 0, 6).dtype == torch.float32


@pytest.mark.parametrize("num_workers", [1, 2, 3, 6])
def test_any_stretch_is_read_whoever_wrote_its_parts(artifact: ArtifactDir, num_workers: int) -> None:
    found = checkpoints.Checkpoint(write(artifact, 100, num_workers))
    for prefix in PREFIXES:
        whole = values_of(prefix, 100)
        for start, end in itertools.combinations(range(7), 2):
            assert torch.equal(found.read(f"{prefix}/w", start, end - start), whole[start:end])


def test_what_a_checkpoint_does_not_hold_is_named(artifact: ArtifactDir) -> None:
    found = checkpoints.Checkpoint(write(artifact, 100))
    with pytest.raises(checkpoints.BadCheckpointError, match="step-00000100 holds no element 6 of param/w"):
        found.read("param/w", 4, 3)
    with pytest.raises(checkpoints.BadCheckpointError, match="holds no element 0 of momentum_buffer/w"):
        found.read("momentum_buffer/w", 0, 1)


def test_a_checkpoint_of_format_1_is_still_read() -> None:
    """The program of 27 November 2026 wrote it: whole tensors of 3 x 2, w0 by rank 0 and w1 by rank 1."""
    folder = Path(__file__).parent / "format_1" / "step-00000100"
    checkpoints.verify(folder)
    found = checkpoints.Checkpoint(folder)
    assert found.manifest.format_version == 1
    assert found.state == state(100).model_copy(update={"versions": found.state.versions})
    assert found.sizes() == {f"{prefix}/w{rank}": 6 for prefix in sorted(PREFIXES) for rank in (0, 1)}
    for start, end in itertools.combinations(range(7), 2):
        assert torch.equal(found.read("exp_avg/w1", start, end - start), torch.full((end - start,), 101.0))
    assert found.rng(1).keys() == device.rng_state(device.CPU).keys()


def test_without_manifest_a_checkpoint_does_not_exist(artifact: ArtifactDir) -> None:
    write(artifact, 100)
    (write(artifact, 200) / layout.MANIFEST).unlink()
    found = checkpoints.newest_complete(artifact)
    assert found is not None
    assert found.state.step == 100


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest", "state"])
def test_damaged_newest_is_passed_over_with_a_loud_warning(
    artifact: ArtifactDir, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    write(artifact, 100)
    folder = write(artifact, 200)
    tensors = folder / "tensors-00001-of-00002.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "truncated":
        tensors.write_bytes(content[:-7])
    elif damage == "flipped":
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "missing":
        tensors.unlink()
    elif damage == "manifest":
        (folder / layout.MANIFEST).write_text('{"format_version": 1}')
    else:
        (folder / checkpoints.STATE).write_text("{}")
    with caplog.at_level(logging.WARNING):
        found = checkpoints.newest_complete(artifact)
    assert found is not None
    assert found.state.step == 100
    assert "DAMAGED CHECKPOINT" in caplog.text
    assert "step-00000200" in caplog.text


def test_nothing_usable_is_none(artifact: ArtifactDir) -> None:
    assert checkpoints.newest_complete(artifact) is None
    (write(artifact, 100) / checkpoints.STATE).unlink()
    assert checkpoints.newest_complete(artifact) is None
    assert checkpoints.any_complete(artifact)


def test_a_format_of_the_future_is_refused(artifact: ArtifactDir) -> None:
    path = write(artifact, 100) / layout.MANIFEST
    path.write_text(dumps(seal(json.loads(path.read_text()) | {"format_version": 99})))
    with pytest.raises(checkpoints.BadCheckpointError, match="format 99"):
        checkpoints.verify(path.parent)


def test_prune_keeps_the_newest_complete_ones_and_removes_leftovers(artifact: ArtifactDir) -> None:
    for step in (10, 20, 30, 40):
        write(artifact, step)
    (artifact.local / layout.step_dir(25)).mkdir()
    write(artifact, 50)
    checkpoints.prune(artifact, newest_step=40, kept=checkpoints.Kept(2))
    assert artifact.listdir(layout.CHECKPOINTS) == ["step-00000030", "step-00000040", "step-00000050"]


def test_prune_never_deletes_what_is_kept_for_good(artifact: ArtifactDir) -> None:
    for step in (10, 20, 30, 40, 45):
        write(artifact, step)
    (artifact.local / layout.step_dir(40) / layout.MANIFEST).unlink()
    checkpoints.prune(artifact, newest_step=45, kept=checkpoints.Kept(1, every_steps=20))
    assert artifact.listdir(layout.CHECKPOINTS) == ["step-00000020", "step-00000045"], "40 was incomplete"


def test_clear_makes_room_for_writing_a_step_again(artifact: ArtifactDir) -> None:
    write(artifact, 10)
    checkpoints.clear(artifact, 10)
    checkpoints.clear(artifact, 20)
    assert checkpoints.newest_complete(artifact) is None


def test_random_generators_survive_the_disk(artifact: ArtifactDir) -> None:
    device.seed_everything(3)
    write(artifact, 10)
    expected = torch.randn(4)
    device.set_rng_state(checkpoints.Checkpoint(artifact.local / layout.step_dir(10)).rng(1), device.CPU)
    assert torch.equal(torch.randn(4), expected)
