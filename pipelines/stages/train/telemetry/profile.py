"""A profile of some training steps: what ran when, what took longest, who held memory."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from pipelines.stages.train import device
from pipelines.stages.train.layout import PROFILE
from pipelines.stages.train.telemetry.config import ProfileConfig
from pipelines.storage.artifact import ArtifactDir

_ROWS = 50

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps of `config` on the ranks of `config`, and writes `profile/rank-N/` into the artifact:

    trace.json.gz        what ran when, for https://ui.perfetto.dev or chrome://tracing
    operators.txt        the operators that took longest
    memory.pickle        on a GPU: allocations, for https://docs.pytorch.org/memory_viz
    """

    def __init__(self, config: ProfileConfig | None, artifact: ArtifactDir, worker_device: torch.device) -> None:
        self._is_traced = config is not None and dist.get_rank() in config.ranks
        self._config, self._artifact, self._device = config, artifact, worker_device
        self._profiler: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """A step begins. A training that resumes in the middle of the steps traces those that are left."""
        if not self._is_traced or self._config is None or self._profiler is not None:
            return
        first, last = self._config.steps
        if first <= step <= last:
            self._is_traced = False  # once
            if self._config.memory:
                device.record_memory(self._device)
            self._profiler = torch.profiler.profile(
                activities=device.profiled(self._device), profile_memory=self._config.memory, record_shapes=True
            )
            self._profiler.start()

    def end(self, step: int) -> None:
        """A step was given out; after the last one the device is waited for, and the files are written."""
        if self._profiler is None or self._config is None or step < self._config.steps[1]:
            return
        device.synchronize(self._device)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        relative = f"{PROFILE}/rank-{dist.get_rank()}"
        folder = self._artifact.local / relative
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        order = "self_cpu_time_total" if self._device.type == "cpu" else f"self_{self._device.type}_time_total"
        (folder / "operators.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=_ROWS))
        if self._config.memory:
            device.write_memory(self._device, folder / "memory.pickle")
        self._artifact.publish(relative)
        logger.info("The profile of steps %d to %d is in %s/%s.", *self._config.steps, self._artifact.url, relative)
