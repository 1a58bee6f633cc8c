"""What one Ray Train worker does: prepare its process, build model and data, run the loop."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from bmojo.allocator import keep_freed_memory
from pipelines.errors import DamagedError, UserError
from pipelines.faults import explained_disk
from pipelines.stages.train.job import TrainJob

if TYPE_CHECKING:
    from data.shards import TokenBatch
    from pipelines.storage.artifact import ArtifactDir


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any] | None:
    """Ray Train's train_loop_per_worker.

    Args: loop_config: {"job": TrainJob}.
    Returns: the facts of the run as a dict on rank 0, None on the others.
    Raises:
        UserError: what the user must fix; it is not tried again.
        InfrastructureError: a disk or the storage failed; neither is that, at once.
    """
    job: TrainJob = loop_config["job"]
    try:
        with explained_disk(job.artifact.local):
            return _train(job)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"A GPU ran out of memory: {str(error).splitlines()[0]} Lower train.micro_batch_size, or use more GPUs or "
            "a higher train.zero_stage."
        ) from error


def _train(job: TrainJob) -> dict[str, Any] | None:
    rank, num_workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = prepare_process(job, rank)

    # After prepare_process: DeepSpeed chooses its accelerator when it is imported.
    from data.errors import DamagedDataError, DataError
    from data.streaming import open_stream
    from pipelines.stages.train import checkpoint as checkpoints
    from pipelines.stages.train import zero
    from pipelines.stages.train.loop import TrainLoop

    zero.quiet_logs()
    resumed = None
    if job.resume_step is not None:
        resumed = checkpoints.Checkpoint(_fetch(job.artifact, checkpoints.step_dir(job.resume_step)))
    trainer = zero.ZeroTrainer(_build_model(job, resumed), job.config, num_workers, device)
    shards_dir = _fetch(job.shards)
    try:
        stream = open_stream(
            shards_dir,
            "train",
            micro_batch_size=job.config.micro_batch_size,
            global_batch_size=job.config.global_batch_size,
            seed=job.config.seed,
        )
        try:
            validation_batches = _validation_batches(job, shards_dir)
            facts = TrainLoop(job, trainer, stream, validation_batches, resumed).run()
        finally:
            stream.close()
    except DamagedDataError as error:
        raise DamagedError(str(error)) from error
    except DataError as error:
        raise UserError(str(error)) from error
    return facts.model_dump() if facts is not None else None


def _fetch(artifact: ArtifactDir, path: str = "") -> Path:
    """A local copy, made by one process of each machine. A collective."""
    if int(os.environ["LOCAL_RANK"]) == 0:
        artifact.fetch(path)
    dist.barrier()
    return artifact.fetch(path)


def _validation_batches(job: TrainJob, shards_dir: Path) -> list[TokenBatch]:
    """Micro batches of the fixed beginning of the validation split, the same on every rank; none where it is empty."""
    from data.shards import read_token_batches

    if not job.has_validation:
        return []
    max_samples = job.config.validation_batches * job.config.global_batch_size
    return list(read_token_batches(shards_dir, "valid", job.config.micro_batch_size, max_samples=max_samples))


def prepare_process(job: TrainJob, rank: int) -> torch.device:
    """Threads, determinism, seeds and the accelerator of this process. Returns the device to train on."""
    from pipelines.stages.train import rng

    config = job.config
    warnings.filterwarnings("ignore", category=FutureWarning)
    if config.on_gpu:
        from ray.train.torch import get_device

        device = get_device()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    else:
        device = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
        num_threads = max(1, int(config.resources.cpus_per_worker))
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        torch.set_num_threads(num_threads)
        keep_freed_memory()
    torch.use_deterministic_algorithms(config.deterministic, warn_only=config.on_gpu)
    # A debugging aid that comes with it and costs a sixth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    rng.seed_everything(config.seed + rank)
    return device


def _build_model(job: TrainJob, resumed: Any) -> Any:
    """The model on the CPU with the weights that training starts or goes on from, the same on every rank."""
    from bmojo import BMojoLM
    from pipelines.stages.models import load_model

    model = BMojoLM(job.model)
    if resumed is not None:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in resumed.tensors("param"):
                parameters.pop(name).copy_(value)
        if parameters:
            raise RuntimeError(f"{resumed.directory}: holds no value of {', '.join(parameters)}.")
    elif job.initial_weights is not None:
        source = f"{job.initial_weights.url}/model"
        initial = load_model(job.initial_weights, "model")
        try:
            model.load_state_dict(initial.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"The weights in {source} do not fit train.model: {error}. Give this stage the model settings of the "
                "train stage it starts from; only window, chunk and eidetic sizes may differ."
            ) from error
    else:
        model.init_weights(job.config.seed)
    return model
