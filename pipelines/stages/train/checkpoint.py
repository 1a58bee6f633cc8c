"""Training checkpoints on disk: portable over worker counts and backends, complete or absent (docs/design/0020).

    checkpoints/step-00000100/
        tensors-00000-of-00002.safetensors   a rank's pieces of the named tensors of a Trainer ("param/NAME",
                                             "exp_avg/NAME", ...): 1-D, float32; the metadata has their starts
        rng-00000-of-00002.safetensors       the random generators of one rank
        state.json                           counters, data position, facts
        manifest.json                        size and SHA-256 of every other file; written last

Format 1 had whole tensors in their shapes, each in the file of one rank; it is still read. Nothing here is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from base.config import StrictConfig
from base.errors import DamagedError
from base.sealed import unseal
from bmojo.tensor_file import save_tensors
from pipelines.engine.stage import Facts
from pipelines.stages.train.guards.pulse import beat
from pipelines.stages.train.layout import MANIFEST, complete_steps, step_dir, steps_of
from pipelines.stages.train.pieces import Piece
from pipelines.storage.artifact import ArtifactDir

STATE = "state.json"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
_STARTS = "starts"  # in the metadata of a file of tensors: JSON, the first element of each piece by key

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
        default_factory=list, description="Steps that were left out: they were not finite, or spikes."
    )
    left_out: list[int] = Field(
        default_factory=list, description="Steps that training leaves out because it went back before a spike."
    )
    recent_losses: list[float] = Field(
        default_factory=list, description="Losses that spikes are measured by, oldest first."
    )
    num_workers: int = Field(description="Workers that wrote the checkpoint.")
    data: dict[str, Any] = Field(description="The data stream's position and the identity of its data.")
    train_loss: float = Field(description="Loss of this step's global batch, in nats per token.")
    initial_valid_loss: float | None = Field(description="Validation loss before the first step.")
    train_time_s: float = Field(description="Seconds spent in steps, over all attempts.")
    history: dict[str, list[tuple[int, float]]] = Field(description="Every point of the curves so far: (step, value).")
    versions: dict[str, str] = Field(description="Versions of the trainer's libraries.")
    backend: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the backend that wrote the checkpoint, ZeRO stage and offload."
    )
    digests: dict[str, str] = Field(
        default_factory=dict, description="Of each named tensor (train/digests.py), as they were copied to be written."
    )


class Kept(NamedTuple):
    """Which checkpoints stay: so many of the newest, and for good those of steps that `every_steps` divides."""

    newest: int
    every_steps: int | None = None


class BadCheckpointError(Exception):
    """A checkpoint is incomplete or damaged; the message says which file and how."""


class _Stored(NamedTuple):
    """Where a piece of a named tensor lies in a checkpoint."""

    start: int
    shape: tuple[int, ...]
    file: str

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


class Checkpoint:
    """A complete checkpoint, read lazily: no more than is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = _read_manifest(directory)
        self.state = _read_sealed(directory / STATE, TrainingState)

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {name: self._open(name) for name in self.manifest.files if name.startswith("tensors-")}

    @cached_property
    def _stored(self) -> dict[str, list[_Stored]]:
        found: dict[str, list[_Stored]] = {}
        for name, file in self._files.items():
            starts = json.loads((file.metadata() or {}).get(_STARTS, "{}"))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                shape = tuple(file.get_slice(key).get_shape())
                found.setdefault(key, []).append(_Stored(starts.get(key, 0), shape, name))
        return {key: sorted(pieces) for key, pieces in sorted(found.items())}

    def sizes(self) -> dict[str, int]:
        """Elements of each named tensor, by key."""
        return {key: pieces[-1].end for key, pieces in self._stored.items()}

    def read(self, key: str, start: int, numel: int) -> torch.Tensor:
        """A stretch of a flattened named tensor, from whatever pieces there are: 1-D, float32.

        Raises: BadCheckpointError: it does not hold all of it.
        """
        beat("reads a checkpoint")
        found = torch.empty(numel)
        at, end = start, start + numel
        for piece in self._stored.get(key, ()):
            if piece.start <= at < min(piece.end, end):
                stop = min(piece.end, end)
                found[at - start : stop - start] = self._read_piece(key, piece, at - piece.start, stop - piece.start)
                at = stop
        if at < end:
            raise BadCheckpointError(
                f"{self.directory} holds no element {at} of {key}, of which {start} to {end - 1} are asked for; it is "
                "of another model or optimizer"
            )
        return found

    def rng(self, rank: int) -> dict[str, torch.Tensor]:
        """Random generator states of one rank of the run that wrote it."""
        with self._open(_rng_file(rank, self.state.num_workers)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.directory / name, framework="pt")
        except SafetensorError as error:
            raise BadCheckpointError(f"{self.directory / name} is no safetensors file: {error}") from error

    def _read_piece(self, key: str, piece: _Stored, first: int, stop: int) -> torch.Tensor:
        """Elements of a stored piece, flattened; of one with rows (format 1) only the rows that hold them are read."""
        file = self._files[piece.file]
        if not piece.shape:
            whole: torch.Tensor = file.get_tensor(key)
            return whole.view(1)[first:stop]
        row = math.prod(piece.shape[1:])
        first_row, end_row = first // row, -(-stop // row)
        rows: torch.Tensor = file.get_slice(key)[first_row:end_row]
        return rows.reshape(-1)[first - first_row * row : stop - first_row * row]


def read_state(artifact: ArtifactDir, step: int) -> TrainingState:
    """What a kept checkpoint says beside its tensors. Raises BadCheckpointError."""
    return _read_sealed(artifact.fetch(f"{step_dir(step)}/{STATE}"), TrainingState)


def write_rank_files(
    artifact: ArtifactDir,
    step: int,
    rank: int,
    num_workers: int,
    pieces: Mapping[str, Piece],
    rng: Mapping[str, torch.Tensor],
) -> dict[str, FileEntry]:
    """Write one rank's share and make it durable. Returns the manifest entries of its files."""
    folder = artifact.local / step_dir(step)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    starts = json.dumps({key: piece.start for key, piece in pieces.items()})
    values = {key: piece.values for key, piece in pieces.items()}
    contents = {
        f"tensors-{rank:05d}-of-{num_workers:05d}.safetensors": (values, {_STARTS: starts}),
        _rng_file(rank, num_workers): (rng, {}),
    }
    for name, (content, metadata) in contents.items():
        entries[name] = FileEntry(**save_tensors(content, folder / name, metadata)._asdict())
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
            _delete(artifact, step)


def delete_after(artifact: ArtifactDir, step: int) -> None:
    """Delete the checkpoints of all later steps, whole or not."""
    for later in steps_of(artifact):
        if later > step:
            _delete(artifact, later)


def _delete(artifact: ArtifactDir, step: int) -> None:
    """Manifest first: a deletion cut short must not leave something that looks complete."""
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


def _rng_file(rank: int, num_workers: int) -> str:
    return f"rng-{rank:05d}-of-{num_workers:05d}.safetensors"


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    manifest = _read_sealed(path, Manifest)
    if manifest.format_version not in READABLE_VERSIONS:
        raise BadCheckpointError(
            f"{path} is of format {manifest.format_version}, this program reads {READABLE_VERSIONS[0]} to "
            f"{FORMAT_VERSION}"
        )
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
