"""What guards found, written down: one JSON line per incident in the stage's artifact, with the samples of the step."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from data.streaming import TokenStream, Worker
from pipelines.stages.train.data import TokenSource
from pipelines.stages.train.layout import INCIDENTS
from pipelines.storage.artifact import ArtifactDir

logger = logging.getLogger(__name__)


class Incidents:
    """Warns on rank 0 and appends to the file; what a resumed training finds again is told once."""

    def __init__(self, artifact: ArtifactDir, sources: Sequence[TokenSource], stream: TokenStream) -> None:
        self._artifact, self._sources, self._stream = artifact, sources, stream
        self._is_writer = dist.get_rank() == 0
        self._lines: list[str] = []
        if self._is_writer and artifact.exists(INCIDENTS):
            self._lines = artifact.read_bytes(INCIDENTS).decode().splitlines()

    def add(self, kind: str, step: int, message: str, **figures: Any) -> None:
        """Note what happened at a step (from 1). `figures` are JSON; the message is for a person."""
        if not self._is_writer:
            return
        logger.warning("%s", message)
        line = json.dumps(
            {"kind": kind, "step": step, **figures, "message": message, "samples": self._samples(step)}, sort_keys=True
        )
        if line not in self._lines:
            self._lines.append(line)
            self._artifact.write_bytes(INCIDENTS, "".join(f"{each}\n" for each in self._lines).encode())

    def _samples(self, step: int) -> list[Mapping[str, Any]]:
        """The global batch of a step, by the numbers that `bmojo lineage` shows."""
        places = self._stream.places(step - 1, Worker())
        return [
            {"source": self._sources[place.source].name, "sample": self._stream.sample_number(place)}
            for place in places
        ]
