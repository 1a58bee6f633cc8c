"""What a resumed training put back, from where, and whether it is what was written: a report per resume."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from pydantic import Field

from pipelines.engine.stage import Facts
from pipelines.stages.train.checkpoint import Checkpoint
from pipelines.stages.train.digests import whole_digests
from pipelines.stages.train.job import TrainJob
from pipelines.stages.train.layout import resume_report, resume_reports, step_dir
from pipelines.stages.train.trainer import Trainer


class Party(Facts):
    """Who wrote a checkpoint, or reads it."""

    num_workers: int
    backend: dict[str, Any] = Field(description="Settings of the backend, ZeRO stage and offload among them.")
    versions: dict[str, str] = Field(description="Versions of its libraries.")


class ResumeReport(Facts):
    """One resume: written to resumes/ of the stage's artifact, and shown in MLflow."""

    step: int = Field(description="Optimizer steps that the checkpoint holds.")
    checkpoint: str = Field(description="Its folder in this artifact.")
    format_version: int = Field(description="Of the checkpoint's files.")
    written_by: Party
    read_by: Party
    optimizer_steps: int = Field(description="The optimizer's own count, put back.")
    num_samples: int = Field(description="Position in the data, put back: sequences trained on.")
    random_generators: bool = Field(description="Put back; false: the number of workers is another.")
    num_tensors: int = Field(description="Named tensors put back: parameters and optimizer state.")
    num_elements: int = Field(description="Their elements.")
    compared: Literal["digests of all elements", "nothing: an earlier version wrote no digests"]
    digests: dict[str, str] = Field(
        description="Of each tensor (train/digests.py), from the trainer's own memory after it was put back; equal to "
        "those in the checkpoint's state.json."
    )


def verify_and_report(job: TrainJob, checkpoint: Checkpoint, trainer: Trainer) -> None:
    """Compare what the trainer holds with what was written, tensor by tensor, and write the report. A collective.

    Raises: RuntimeError: a tensor is not what was written.
    """
    state = checkpoint.state
    digests = whole_digests(trainer.pieces())
    if state.digests and digests != state.digests:
        differ = [key for key in {**state.digests, **digests} if state.digests.get(key) != digests.get(key)]
        raise RuntimeError(
            f"{differ[0]} is not what {checkpoint.directory} holds, after it was put back on "
            f"{dist.get_world_size()} workers: digest {digests.get(differ[0])}, expected "
            f"{state.digests.get(differ[0])} ({len(differ)} of {len(state.digests)} tensors differ). The file itself "
            "is sound, so look for faulty memory, or report a bug."
        )
    if dist.get_rank():
        return
    report = ResumeReport(
        step=state.step,
        checkpoint=step_dir(state.step),
        format_version=checkpoint.manifest.format_version,
        written_by=Party(num_workers=state.num_workers, backend=state.backend, versions=state.versions),
        read_by=Party(
            num_workers=dist.get_world_size(),
            backend=job.config.backend.model_dump(mode="json"),
            versions=dict(trainer.versions),
        ),
        optimizer_steps=state.optimizer_steps,
        num_samples=state.num_samples,
        random_generators=state.num_workers == dist.get_world_size(),
        num_tensors=len(trainer.shapes),
        num_elements=sum(shape.numel() for shape in trainer.shapes.values()),
        compared="digests of all elements" if state.digests else "nothing: an earlier version wrote no digests",
        digests=digests,
    )
    number = len(resume_reports(job.artifact)) + 1
    job.artifact.write_json(resume_report(number, state.step), report.model_dump(mode="json"))
