"""What one Ray Train worker does: prepare its process, build model and data, run the loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from bmojo.allocator import keep_freed_memory
from data.shards import TokenBatch, read_token_batches
from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.faults import explained_disk
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.train import device
from pipelines.stages.train.checkpoint import Checkpoint
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.environment import set_worker_environment
from pipelines.stages.train.guards.pulse import beat, patiently, period_s, signs_of_life
from pipelines.stages.train.job import TrainFacts, TrainJob
from pipelines.stages.train.layout import step_dir
from pipelines.stages.train.loop import TrainLoop
from pipelines.stages.train.weights import build_model, model_in_parts
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.notices import warnings_noted


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any] | None:
    """Ray Train's train_loop_per_worker.

    Args: loop_config: {"job": TrainJob}.
    Returns: the facts of the run as a dict on rank 0, None on the others.
    Raises:
        UserError: what the user must fix; it is not tried again.
        InfrastructureError: a disk or the storage failed; neither is that, at once.
    """
    job: TrainJob = loop_config["job"]
    remedy = (
        "Lower train.micro_batch_size, set train.cuda_graphs: false (graphs keep their memory between steps), or use "
        f"more GPUs or {job.config.backend.memory_advice}."
    )
    noted = warnings_noted(job.metrics) if dist.get_rank() == 0 else nullcontext()
    with explained_disk(job.artifact.local), device.explained_memory(remedy), noted, _signs_of_life(job):
        facts = _train(job)
    return facts.model_dump() if facts is not None else None


@contextmanager
def _signs_of_life(job: TrainJob) -> Iterator[None]:
    """Tell the watchdog how far this worker is, if there is one."""
    if job.board is None:
        yield
        return
    rank = dist.get_rank()
    job.board.join(rank)
    with signs_of_life(job.board, rank, period_s(job.config.hang_limit_s)):
        yield


def _train(job: TrainJob) -> TrainFacts | None:
    beat("prepares its process")
    prepare_process(job.config, dist.get_rank())
    worker_device = job.config.backend.worker_device(job.config.on_gpu)
    resumed = None
    if job.resume_step is not None:
        beat("reads the checkpoint")
        resumed = Checkpoint(_fetch(job.artifact, step_dir(job.resume_step)))
    elif job.start is not None and job.start.step is not None:
        _fetch(job.start.artifact, step_dir(job.start.step))
    beat("starts the trainer")
    model, parts = model_in_parts(job) if job.config.backend.shards_parameters else (build_model(job), ())
    trainer = job.config.backend.start(model, job.config, worker_device, parts)
    data = job.config.data
    stream = TokenStream(
        [token_split(source.artifact, "train", data.cache_bytes) for source in job.sources],
        micro_batch_size=job.config.worker_micro_batch_size,
        global_batch_size=job.config.global_batch_size,
        order=StreamOrder(job.config.seed, num_paths=data.paths, block_samples=data.shuffle_block_samples),
        worker=Worker(dist.get_rank(), dist.get_world_size()),
        batches=job.batches,
        mixture=job.mixture,
        pin_memory=job.config.on_gpu,
    )
    with stream:
        loop = TrainLoop(job, trainer, stream, _validation_batches(job), resumed, _is_preempted, _fetch)
        with loop.saver:
            return loop.run()


def _is_preempted() -> bool:
    """Whether Ray drains the machine of a worker, as autoscalers do on the notice of a spot machine. A collective."""
    return ray.train.get_preemption_info() is not None


def _fetch(artifact: ArtifactDir, path: str = "") -> Path:
    """A local copy, made by one process of each machine. A collective."""
    if ray.train.get_context().get_local_rank() == 0:
        with patiently("fetches a checkpoint"):
            artifact.fetch(path)
    dist.barrier()
    return artifact.fetch(path)


def _validation_batches(job: TrainJob) -> dict[str, list[TokenBatch]]:
    """For each source that has a validation split: micro batches of its fixed beginning, the same on every rank."""
    max_samples = job.config.validation_batches * job.config.global_batch_size
    batches = {}
    for source in job.sources:
        if source.has_validation:
            valid = token_split(source.artifact, "valid", job.config.data.cache_bytes)
            batches[source.name] = list(read_token_batches(valid, job.config.micro_batch_size, max_samples=max_samples))
    return batches


def prepare_process(config: TrainStageConfig, rank: int) -> None:
    """Set environment, threads, determinism and seeds of this process."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    set_worker_environment(config)
    if not config.on_gpu:
        torch.set_num_threads(config.threads_per_worker)
        keep_freed_memory()
    torch.use_deterministic_algorithms(config.deterministic, warn_only=config.on_accelerator)
    # A debugging aid that comes with it and costs a sixth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    device.seed_everything(config.seed + rank)
