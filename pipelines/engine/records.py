"""The record of a finished stage: the last file written into its artifact directory, whose presence means done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from base.errors import DamagedError
from pipelines.engine.fingerprint import Fingerprint, FingerprintParts
from pipelines.engine.lease import LeaseLostError
from pipelines.engine.stage import Config, Inputs, Output, Stage, StageResult
from pipelines.storage import Storage
from pipelines.storage.artifact import RECORD, ArtifactDir, FileEntry

FORMAT = 2


class StageRecord(BaseModel):
    """Facts about a finished stage: what it was, what it read, what it gave, and what made it."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    format: int = FORMAT
    kind: str
    name: str
    fingerprint: str
    config: dict[str, Any]  # resolved, secrets masked
    parts: FingerprintParts
    inputs: dict[str, str]  # stage name -> fingerprint
    output: dict[str, Any]
    files: dict[str, FileEntry]  # by path in the artifact; shards, checkpoints and slices have digests of their own
    created_at: str  # ISO 8601, UTC
    duration_s: float
    versions: dict[str, str]
    git_commit: str | None
    hardware: dict[str, str] = Field(default_factory=dict)  # of the machine of the stage's process (provenance)
    lease_number: int = 0  # of the owner that made it


@dataclass(frozen=True)
class FinishedStage:
    """A record together with the artifact directory it was found in."""

    artifact: ArtifactDir
    record: StageRecord

    def result(self, stage: Stage[Config, Inputs, Output]) -> StageResult[Output]:
        """Result for the readers of the stage. Raises DamagedError if the record's output does not fit the kind."""
        try:
            output: Any = stage.output_type.model_validate(self.record.output)
        except ValidationError as error:
            raise _damaged(self.artifact, error) from error
        return StageResult(self.record.fingerprint, self.artifact, output)


class Artifacts:
    """The artifact directories of one storage: <storage>/artifacts/<kind>/<name>-<first 8 digits of the fingerprint>/.

    Directory listings are read once per kind and instance.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._listed: dict[str, list[str]] = {}

    @staticmethod
    def relpath(kind: str, name: str, fingerprint: Fingerprint) -> str:
        """Path of a stage's artifact, relative to the storage."""
        return f"artifacts/{kind}/{name}-{fingerprint.short}"

    def directory(self, kind: str, name: str, fingerprint: Fingerprint) -> ArtifactDir:
        """The artifact directory of a stage, whether it exists or not."""
        return ArtifactDir(self.storage, self.relpath(kind, name, fingerprint))

    def find(self, kind: str, name: str, fingerprint: Fingerprint) -> FinishedStage | None:
        """The finished stage with this fingerprint, under this name or any other; None where there is none.

        Raises: DamagedError: its record is damaged.
        """
        own = self.directory(kind, name, fingerprint)
        others = [
            ArtifactDir(self.storage, f"artifacts/{kind}/{directory}")
            for directory in self._directories(kind)
            if directory.endswith(f"-{fingerprint.short}") and directory != f"{name}-{fingerprint.short}"
        ]
        for artifact in (own, *others):
            record = read_record(artifact)
            if record is not None and record.fingerprint == fingerprint.digest:
                return FinishedStage(artifact, record)
        return None

    def is_started(self, kind: str, name: str, fingerprint: Fingerprint) -> bool:
        """Return True if an earlier attempt left something in the stage's directory."""
        return bool(self.directory(kind, name, fingerprint).listdir())

    def latest(self, kind: str, name: str) -> StageRecord | None:
        """The newest readable record of a stage of this kind and name, whatever its fingerprint."""
        records = [
            _readable_record(ArtifactDir(self.storage, f"artifacts/{kind}/{directory}"))
            for directory in self._directories(kind)
            if directory.rpartition("-")[0] == name
        ]
        return max((record for record in records if record), key=lambda record: record.created_at, default=None)

    def _directories(self, kind: str) -> list[str]:
        if kind not in self._listed:
            self._listed[kind] = self.storage.list(f"artifacts/{kind}")
        return self._listed[kind]


def read_record(artifact: ArtifactDir) -> StageRecord | None:
    """The record in an artifact directory, None where the stage is not finished. Raises DamagedError."""
    try:
        return StageRecord.model_validate(artifact.read_json(RECORD))
    except FileNotFoundError:
        return None
    except (ValidationError, DamagedError) as error:
        raise _damaged(artifact, error) from error


def write_record(artifact: ArtifactDir, record: StageRecord) -> None:
    """Mark the stage done. Everything else of it must be durable before.

    Raises: LeaseLostError: an owner with a higher lease number has finished it; its record stays.
    """
    value = record.model_dump(mode="json")
    if artifact.create_json(RECORD, value):
        return
    found = read_record(artifact)
    if found is not None and found.lease_number >= record.lease_number:
        raise LeaseLostError(
            f"{artifact.url} was finished meanwhile by another process, under lease {found.lease_number}; this one "
            f"holds lease {record.lease_number}. The same command reuses that result."
        )
    artifact.write_json(RECORD, value)  # an earlier owner was late; the files are ours by now


def _readable_record(artifact: ArtifactDir) -> StageRecord | None:
    try:
        return read_record(artifact)
    except DamagedError:
        return None


def _damaged(artifact: ArtifactDir, error: Exception) -> DamagedError:
    what = str(error.__cause__) if isinstance(error, DamagedError) else _first_problem(error)
    return DamagedError(
        f"{artifact.url}/{RECORD} is damaged, or another version of this program wrote it: {what}. "
        f"Delete the directory {artifact.url} to have the stage run again."
    )


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}"
    return str(error)
