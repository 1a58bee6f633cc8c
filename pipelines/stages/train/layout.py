"""Where in a train stage's artifact its files are. Light to import: the scheduler looks here too."""

from __future__ import annotations

import re

from pipelines.storage.artifact import ArtifactDir

CHECKPOINTS = "checkpoints"
INCIDENTS = "incidents.jsonl"  # what guards found
PROFILE = "profile"
MANIFEST = "manifest.json"  # written last: with it the checkpoint is complete
_STEP_DIR = re.compile(r"step-(\d{8,})")


def step_dir(step: int) -> str:
    """Where in the artifact the checkpoint of a step lives."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def steps_of(artifact: ArtifactDir) -> list[int]:
    """Steps with something of a checkpoint, complete or not."""
    if not artifact.exists(CHECKPOINTS):
        return []
    matches = (_STEP_DIR.fullmatch(name.rstrip("/")) for name in artifact.listdir(CHECKPOINTS))
    return [int(match[1]) for match in matches if match]


def complete_steps(artifact: ArtifactDir) -> list[int]:
    """Steps whose checkpoint was completed, damaged since or not."""
    return [step for step in steps_of(artifact) if artifact.exists(f"{step_dir(step)}/{MANIFEST}")]
