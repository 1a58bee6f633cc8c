"""All that a training tells of itself at a logged step beside its losses: speed, times by part, use of the machines."""

from __future__ import annotations

import logging

import torch.distributed as dist

from bmojo.counting import count
from pipelines.stages.train import device
from pipelines.stages.train.job import TrainJob
from pipelines.stages.train.meter import Meter
from pipelines.stages.train.telemetry.norms import GroupNorms
from pipelines.stages.train.telemetry.profile import StepProfiler
from pipelines.stages.train.telemetry.times import Part
from pipelines.stages.train.telemetry.usage import WorkerUsage
from pipelines.stages.train.trainer import Trainer

_STARVED = 0.1  # share of a step's time that waits for data, above which a remedy is named

logger = logging.getLogger(__name__)


class Telemetry:
    """One worker's. The first points of an attempt have the start-up of reader and kernels in them."""

    def __init__(self, job: TrainJob, trainer: Trainer) -> None:
        """Measures the peak of matrix products. A collective."""
        self.counts = count(job.model, job.seq_len)
        self.peaks = device.peaks(trainer.device, job.config.autocast_bf16)
        self.meter = Meter(self.counts.train_flops_per_token, trainer.device)
        self.times = trainer.times
        self.norms = GroupNorms(trainer, job.config.log_norms_every_steps)
        self._usage = WorkerUsage(job.metrics, dist.get_rank(), dist.get_world_size(), trainer.device)
        self._profiler = StepProfiler(job.config.profile, job.artifact, trainer.device)
        self._logged_step: int | None = None
        self._is_starvation_told = False

    def begin_step(self, step: int, is_logged: bool) -> None:
        """A step begins, with the wait for its data."""
        self.meter.start()
        self.times.begin_step(is_logged)
        self._profiler.begin(step)

    def end_step(self, step: int) -> None:
        """A step was given out; the device may still be busy with it."""
        self._profiler.end(step)

    def points(self, step: int, grad_norm: float | None) -> dict[str, float | None]:
        """The points of the curves at a logged step. Waits for the device. A collective.

        Args: grad_norm: before clipping; None: the step was not applied.
        """
        self.meter.stop()
        speed, seconds = self.meter.take(), self.times.take()
        if self._logged_step is not None and step > self._logged_step:  # not so after going back
            self._look_at_starvation(step, seconds, speed.seconds / (step - self._logged_step))
        self._logged_step = step
        self._usage.report(step)
        return {
            "train/hours": self.meter.total_time_s / 3600,
            "train/tokens_per_s": speed.tokens_per_s,
            "train/mfu": self.meter.mfu(speed.tokens_per_s, self.peaks.of_mfu),
            "train/mfu_of_measured": self.meter.mfu(speed.tokens_per_s, self._second_peak),
            **self.norms.points(grad_norm),
            **{f"train/time/{part}": value for part, value in seconds.items()},
        }

    def facts(self, num_tokens: int) -> dict[str, float | None]:
        """Speed over the whole training, for its result."""
        tokens_per_s = num_tokens / self.meter.total_time_s
        return {
            "tokens_per_s": tokens_per_s,
            "mfu": self.meter.mfu(tokens_per_s, self.peaks.of_mfu),
            "peak_flops": self.peaks.of_mfu,
            "mfu_of_measured": self.meter.mfu(tokens_per_s, self.peaks.measured),
            "measured_peak_flops": self.peaks.measured,
        }

    @property
    def _second_peak(self) -> float | None:
        """The measured peak, where the MFU is not a share of it anyway."""
        return self.peaks.measured if self.peaks.is_by_data_sheet else None

    def _look_at_starvation(self, step: int, seconds: dict[Part, float], step_s: float) -> None:
        waited_s = seconds.get(Part.DATA, 0.0)
        if self._is_starvation_told or not step_s or waited_s <= _STARVED * step_s:
            return
        self._is_starvation_told = True
        logger.warning(
            "Rank %d waited for data %.0f%% of the time up to step %d (%.3g of %.3g s per step: train/time/data). "
            "One thread per worker reads and collates. If shards come from an object store, raise data.cache_bytes or "
            "put one of data.paths on each machine; else give workers another core (resources.cpus_per_worker).",
            dist.get_rank(), 100 * waited_s / step_s, step, waited_s, step_s,
        )  # fmt: skip
