"""Where in a train stage's artifact its files are. Light to import: the scheduler looks here too."""

from __future__ import annotations

import re

from pipelines.storage.artifact import ArtifactDir

CHECKPOINTS = "checkpoints"
INCIDENTS = "incidents.jsonl"  # what guards found
PROFILE = "profile"
RESUMES = "resumes"
MANIFEST = "manifest.json"  # written last: with it the checkpoint is complete
_STEP_DIR = re.compile(r"step-(\d{8,})")


def step_dir(step: int) -> str:
    """Where in the artifact the checkpoint of a step lives."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def resume_report(number: int, step: int) -> str:
    """Where in the artifact the report of the n-th resume lives. Args: step: of its checkpoint."""
    return f"{RESUMES}/{number:04d}-step-{step:08d}.json"


def resume_reports(artifact: ArtifactDir) -> list[str]:
    """All there are, by their places in the artifact, the first one first."""
    return [f"{RESUMES}/{name}" for name in artifact.listdir(RESUMES)]


def steps_of(artifact: ArtifactDir) -> list[int]:
    """Steps with something of a checkpoint, complete or not."""
    if not artifact.exists(CHECKPOINTS):
        return []
    matches = (_STEP_DIR.fullmatch(name.rstrip("/")) for name in artifact.listdir(CHECKPOINTS))
    return [int(match[1]) for match in matches if match]


def complete_steps(artifact: ArtifactDir) -> list[int]:
    """Steps whose checkpoint was completed, damaged since or not."""
    return [step for step in steps_of(artifact) if artifact.exists(f"{step_dir(step)}/{MANIFEST}")]
