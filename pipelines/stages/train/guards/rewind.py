"""Going back to a checkpoint in the middle of training, on all ranks to the same one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.stages.train import checkpoint as checkpoints
from pipelines.stages.train.checkpoint import BadCheckpointError, Checkpoint
from pipelines.stages.train.layout import complete_steps, step_dir
from pipelines.storage.artifact import ArtifactDir

Fetch = Callable[[ArtifactDir, str], Path]
"""Bring a part of an artifact to this machine. A collective."""
_NONE = -1

logger = logging.getLogger(__name__)


def go_back(artifact: ArtifactDir, latest: int, wished: int, fetch: Fetch, device: torch.device) -> Checkpoint | None:
    """The newest whole checkpoint up to step `wished`, else up to `latest`; None where there is none. A collective.

    Those of later steps are deleted: training takes these steps again, and others.
    """
    step = _NONE
    if dist.get_rank() == 0:
        step = _newest_whole(artifact, wished)
        if step == _NONE:
            step = _newest_whole(artifact, latest)
        if step != _NONE:
            checkpoints.delete_after(artifact, step)
    agreed = torch.tensor(step, device=device)
    dist.broadcast(agreed, src=0)
    step = int(agreed)
    return None if step == _NONE else Checkpoint(fetch(artifact, step_dir(step)))


def _newest_whole(artifact: ArtifactDir, latest: int) -> int:
    for step in sorted((step for step in complete_steps(artifact) if step <= latest), reverse=True):
        try:
            checkpoints.verify(artifact.fetch(step_dir(step)))
        except (BadCheckpointError, OSError) as error:
            logger.warning("DAMAGED CHECKPOINT passed over: %s. Look for a failing disk.", error)
        else:
            return step
    return _NONE
