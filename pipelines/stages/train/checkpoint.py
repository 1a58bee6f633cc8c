"""Training checkpoints on disk: portable over worker counts and backends, complete or absent (docs/design/0020).

    checkpoints/step-00000100/
        tensors-00000-of-00002.safetensors   a rank's share of the named tensors of a Trainer: "param/NAME",
                                             "exp_avg/NAME", "exp_avg_sq/NAME", each whole, in float32
        rng-00000-of-00002.safetensors       the random generators of one rank
        state.json                           counters, data position, facts
        manifest.json                        size and SHA-256 of every other file; written last

Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, ValidationError
from safetensors import safe_open

from base.config import StrictConfig
from base.errors import DamagedError
from base.sealed import unseal
from bmojo.checkpoint_io import save_tensors
from pipelines.engine.stage import Facts
from pipelines.stages.train import device
from pipelines.stages.train.layout import MANIFEST, complete_steps, step_dir, steps_of
from pipelines.stages.train.trainer import PARAM, Trainer
from pipelines.storage.artifact import ArtifactDir

STATE = "state.json"
FORMAT_VERSION = 1

logger = logging.getLogger(__name__)

Content = TypeVar("Content", bound=StrictConfig)


class FileEntry(StrictConfig):
    """What the manifest says of one file."""

    size_bytes: int
    sha256: str


class Manifest(StrictConfig):
    """Every file of a checkpoint but the manifest itself."""

    format_version: int
    step: int
    files: dict[str, FileEntry]


class TrainingState(Facts):
    """All of a checkpoint that is not a tensor."""

    step: int = Field(description="Optimizer steps taken.")
    num_tokens: int = Field(description="Tokens trained on.")
    num_samples: int = Field(description="Sequences trained on, over all workers.")
    optimizer_steps: int = Field(description="AdamW's step count: the steps of this stage that were applied.")
    skipped_steps: list[int] = Field(
        default_factory=list, description="Steps that were left out, because they were not finite."
    )
    num_workers: int = Field(description="Workers that wrote the checkpoint.")
    data: dict[str, Any] = Field(description="The data stream's position and the identity of its data.")
    train_loss: float = Field(description="Loss of this step's global batch, in nats per token.")
    initial_valid_loss: float | None = Field(description="Validation loss before the first step.")
    train_time_s: float = Field(description="Seconds spent in steps, over all attempts.")
    history: dict[str, list[tuple[int, float]]] = Field(description="Every point of the curves so far: (step, value).")
    versions: dict[str, str] = Field(description="Versions of the trainer's libraries.")


class Kept(NamedTuple):
    """Which checkpoints stay: so many of the newest, and for good those of steps that `every_steps` divides."""

    newest: int
    every_steps: int | None = None


class BadCheckpointError(Exception):
    """A checkpoint is incomplete or damaged; the message says which file and how."""


class Checkpoint:
    """A complete checkpoint, read lazily: a tensor is read when asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = _read_manifest(directory)
        self.state = _read_sealed(directory / STATE, TrainingState)

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of each parameter, one at a time."""
        for key, tensor in self._tensors(is_wanted=lambda key: key.startswith(f"{PARAM}/")):
            yield key.removeprefix(f"{PARAM}/"), tensor

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, whole tensor) of each of the trainer's named tensors that is not a parameter, one at a time."""
        return self._tensors(is_wanted=lambda key: not key.startswith(f"{PARAM}/"))

    def rng(self, rank: int) -> dict[str, torch.Tensor]:
        """Random generator states of one rank of the run that wrote it."""
        name = _rng_file(rank, self.state.num_workers)
        with safe_open(self.directory / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping

    def _tensors(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(name for name in self.manifest.files if name.startswith("tensors-")):
            with safe_open(self.directory / name, framework="pt") as file:
                for key in filter(is_wanted, file.keys()):
                    yield key, file.get_tensor(key)


def save(
    artifact: ArtifactDir, trainer: Trainer, state: TrainingState, kept: Kept, before_complete: Callable[[], object]
) -> None:
    """Write a checkpoint, each rank its share, then delete those that are not kept. A collective.

    Args: before_complete: called on rank 0 before the checkpoint counts as complete.
    """
    rank, num_workers = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        clear(artifact, state.step)
    dist.barrier()
    tensors = {}
    owners = assign_owners([shape.numel() for shape in trainer.shapes.values()], num_workers)
    for key, owner in zip(trainer.shapes, owners, strict=True):
        whole = trainer.tensor(key)
        if owner == rank:
            tensors[key] = whole.detach().to("cpu", copy=True).contiguous()
    entries = write_rank_files(artifact, state.step, rank, num_workers, tensors, device.rng_state(trainer.device))
    all_entries: list[dict[str, FileEntry]] = [{} for _ in range(num_workers)]
    dist.all_gather_object(all_entries, entries)
    if rank == 0:
        before_complete()
        complete(artifact, state, {name: entry for each in all_entries for name, entry in each.items()})
        prune(artifact, state.step, kept)
    dist.barrier()


def write_rank_files(
    artifact: ArtifactDir,
    step: int,
    rank: int,
    num_workers: int,
    tensors: Mapping[str, torch.Tensor],
    rng: Mapping[str, torch.Tensor],
) -> dict[str, FileEntry]:
    """Write one rank's share and make it durable. Returns the manifest entries of its files."""
    folder = artifact.local / step_dir(step)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    contents = {f"tensors-{rank:05d}-of-{num_workers:05d}.safetensors": tensors, _rng_file(rank, num_workers): rng}
    for name, content in contents.items():
        save_tensors(content, folder / name)
        entries[name] = _entry_of(folder / name)
        artifact.publish(f"{step_dir(step)}/{name}")
    return entries


def complete(artifact: ArtifactDir, state: TrainingState, entries: Mapping[str, FileEntry]) -> None:
    """Write state and manifest: from here on the checkpoint exists."""
    relative = step_dir(state.step)
    artifact.write_json(f"{relative}/{STATE}", state.model_dump(mode="json"))
    files = dict(entries) | {STATE: _entry_of(artifact.fetch(f"{relative}/{STATE}"))}
    manifest = Manifest(format_version=FORMAT_VERSION, step=state.step, files=files)
    artifact.write_json(f"{relative}/{MANIFEST}", manifest.model_dump(mode="json"))


def clear(artifact: ArtifactDir, step: int) -> None:
    """Remove what an interrupted or damaged checkpoint of this step left behind."""
    if step in steps_of(artifact):
        artifact.delete(step_dir(step))


def prune(artifact: ArtifactDir, newest_step: int, kept: Kept) -> None:
    """Delete checkpoints up to `newest_step`, which must be complete, that are not kept, and what is incomplete."""
    older = sorted((step for step in steps_of(artifact) if step <= newest_step), reverse=True)
    finished = [step for step in older if artifact.exists(f"{step_dir(step)}/{MANIFEST}")]
    stays = {*finished[: kept.newest]}
    if kept.every_steps is not None:
        stays |= {step for step in finished if step % kept.every_steps == 0}
    for step in older:
        if step not in stays:
            # Manifest first: a deletion cut short must not leave something that looks complete.
            if step in finished:
                artifact.delete(f"{step_dir(step)}/{MANIFEST}")
            artifact.delete(step_dir(step))


def newest_complete(artifact: ArtifactDir) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as the manifest says; damaged ones are passed over with a warning."""
    for step in sorted(steps_of(artifact), reverse=True):
        relative = step_dir(step)
        if not artifact.exists(f"{relative}/{MANIFEST}"):
            logger.info("%s/%s has no manifest: its writing was cut short; passed over.", artifact.url, relative)
            continue
        try:
            directory = artifact.fetch(relative)
            verify(directory)
            return Checkpoint(directory)
        except (BadCheckpointError, OSError, ValidationError) as error:
            logger.warning(
                "DAMAGED CHECKPOINT passed over: %s. Training goes on from the one before it, if there is one. "
                "Look for a failing disk.",
                error,
            )
    return None


def any_complete(artifact: ArtifactDir) -> bool:
    """Whether a checkpoint was ever completed here, damaged or not."""
    return bool(complete_steps(artifact))


def verify(directory: Path) -> None:
    """Raises: BadCheckpointError: a file is missing, has another size or other bytes than the manifest says."""
    for name, expected in _read_manifest(directory).files.items():
        path = directory / name
        if not path.is_file():
            raise BadCheckpointError(f"{path} is missing")
        if path.stat().st_size != expected.size_bytes:
            raise BadCheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {expected.size_bytes}")
        if _sha256(path) != expected.sha256:
            raise BadCheckpointError(
                f"{path} has other bytes than those written (its SHA-256 differs from the manifest's)"
            )


def assign_owners(sizes: Sequence[int], num_workers: int) -> list[int]:
    """Which rank writes each tensor, so that all write about as much. The same on every rank."""
    loads = [0] * num_workers
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[index] = min(range(num_workers), key=lambda rank: (loads[rank], rank))
        loads[owners[index]] += sizes[index]
    return owners


def _rng_file(rank: int, num_workers: int) -> str:
    return f"rng-{rank:05d}-of-{num_workers:05d}.safetensors"


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    manifest = _read_sealed(path, Manifest)
    if manifest.format_version != FORMAT_VERSION:
        raise BadCheckpointError(f"{path} is of format {manifest.format_version}, this program reads {FORMAT_VERSION}")
    return manifest


def _read_sealed(path: Path, model: type[Content]) -> Content:
    try:
        return model.model_validate(unseal(path.read_bytes(), str(path)))
    except DamagedError as error:
        raise BadCheckpointError(str(error)) from error
    except ValidationError as error:
        raise BadCheckpointError(f"{path} is of another version ({error.error_count()} problems)") from error


def _entry_of(path: Path) -> FileEntry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(size_bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
