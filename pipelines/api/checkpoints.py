"""The checkpoints that a run's train stages have kept: which, how large, and whether their bytes are as written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipelines.api.finding import require_kind
from pipelines.engine.lease import Watch
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts
from pipelines.stages.train.layout import MANIFEST, step_dir, steps_of
from pipelines.stages.train.stage import TrainStage

if TYPE_CHECKING:
    from pipelines.storage.artifact import ArtifactDir


class CheckpointRow(Facts):
    """One checkpoint of a train stage."""

    stage: str
    step: int
    condition: Literal["complete", "verified", "damaged", "incomplete"] = Field(
        description="complete: written to the end. verified: every byte is as written. incomplete: its writing was cut "
        "short, or is under way; training passes it over."
    )
    problem: str = Field("", description="What is wrong with one that is damaged.")
    num_tokens: int | None = Field(None, description="Tokens trained on by then.")
    train_loss: float | None = Field(None, description="Loss of that step's batch, in nats per token.")
    num_workers: int | None = Field(None, description="Workers that wrote it; any number can resume from it.")
    size_bytes: int | None = None
    url: str


def checkpoints(
    run: Run, stage: str | None = None, verify: bool = False, on_watch: Watch | None = None
) -> Iterator[CheckpointRow]:
    """Checkpoints of one train stage or of all, oldest first, each as soon as it was looked at.

    Args:
        verify: read every file and compare its digest. Fetches them from an object store.
        on_watch: see Run.state.
    Raises: UserError: the stage is no train stage.
    """
    if stage is not None:
        require_kind(run, stage, TrainStage.kind)
    for name, state in run.state(on_watch).stages.items():
        if state.kind == TrainStage.kind and stage in (None, name):
            artifact = run.artifact_of(state)
            if artifact is not None:
                for step in sorted(steps_of(artifact)):
                    yield _row(artifact, name, step, verify)


def _row(artifact: ArtifactDir, stage: str, step: int, verify: bool) -> CheckpointRow:
    from pipelines.stages.train import checkpoint as files

    folder = step_dir(step)
    url = f"{artifact.url}/{folder}"
    if not artifact.exists(f"{folder}/{MANIFEST}"):
        return CheckpointRow(stage=stage, step=step, condition="incomplete", url=url)
    try:
        found = files.Checkpoint(_fetched(artifact, folder, whole=verify))
        if verify:
            files.verify(found.directory)
    except (files.BadCheckpointError, OSError) as error:
        return CheckpointRow(stage=stage, step=step, condition="damaged", problem=str(error), url=url)
    return CheckpointRow(
        stage=stage,
        step=step,
        condition="verified" if verify else "complete",
        num_tokens=found.state.num_tokens,
        train_loss=found.state.train_loss,
        num_workers=found.state.num_workers,
        size_bytes=sum(entry.size_bytes for entry in found.manifest.files.values()),
        url=url,
    )


def _fetched(artifact: ArtifactDir, folder: str, whole: bool) -> Path:
    """The checkpoint's folder on this machine; of one in an object store only what is small, unless it is wanted."""
    from pipelines.stages.train.checkpoint import STATE

    if whole:
        return artifact.fetch(folder)
    artifact.fetch(f"{folder}/{STATE}")
    return artifact.fetch(f"{folder}/{MANIFEST}").parent
