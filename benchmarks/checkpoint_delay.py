"""How long a checkpoint delays training, in steps, on CPU workers with DeepSpeed's trainer and real files.

Blocks of steps are timed in turn, one without and one with a checkpoint at its beginning, so that what else the machine
does meets both alike. The delay is the difference of a pair in median steps: it has the check for ruined weights, the
pause for the copy, and what writing beside the steps takes from them. A block is long enough for the write to end in
it; `write` is how long that took.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from bmojo import BMojoLM
from data.shards import TokenBatch
from pipelines.loading import PRESETS_DIR
from pipelines.stages.train import device
from pipelines.stages.train.checkpoint import Kept, TrainingState
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU
from pipelines.stages.train.divergence import first_ruined_tensor
from pipelines.stages.train.saving import Saver
from pipelines.stages.train.trainer import Trainer
from pipelines.stages.train.worker import prepare_process
from pipelines.storage.artifact import ArtifactDir

QUICKSTART = {
    "pattern": "bmojo*4", "d_model": 192, "num_heads": 3, "ssm_head_dim": 64, "window_size": 128, "chunk_size": 64,
    "num_eidetic": 32, "fading_output": "memory_and_residual", "vocab_size": 4096,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    with socket.socket() as free, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_worker, (port, options, Path(folder)), nprocs=options.workers)


def _worker(rank: int, port: int, options: argparse.Namespace, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = config_of(options)
    prepare_process(config, rank)
    dist.init_process_group("gloo")
    trainer = config.backend.start(BMojoLM(config.model), config, CPU)
    saver = Saver(ArtifactDir.at(folder / "train"), Kept(1), CPU, lambda: None)
    batches = batches_of(config, options.seq_len)
    _steps(trainer, batches, 2)
    step_s = _steps(trainer, batches, options.steps) / options.steps
    delays, pauses, writes = [], [], []
    for repeat in range(options.repeats + 1):
        without_s = _steps(trainer, batches, options.steps)
        start = time.perf_counter()
        first_ruined_tensor(trainer)
        saver.save(_state(repeat, options.workers), trainer.pieces(), device.rng_state(CPU))
        pause_s = time.perf_counter() - start
        with_s = pause_s + _steps(trainer, batches, options.steps)
        rest = time.perf_counter()
        saver.wait()
        writes.append(saver.write_s)
        if time.perf_counter() - rest > step_s and rank == 0:
            print(f"the write took longer than {options.steps} steps: give more --steps", flush=True)
        if repeat:  # the first one makes the memory for the copies
            delays.append((with_s - without_s) / step_s)
            pauses.append(pause_s / step_s)
    if rank == 0:
        num_params = sum(shape.numel() for key, shape in trainer.shapes.items() if key.startswith("param/"))
        print("| parameters | workers | ZeRO | step, ms | delay, steps | lowest .. highest | pause | write |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        print(
            f"| {num_params:,} | {options.workers} | {options.zero_stage} | {step_s * 1e3:,.0f} | "
            f"{statistics.median(delays):.2f} | {min(delays):.2f} .. {max(delays):.2f} | "
            f"{statistics.median(pauses):.2f} | {statistics.median(writes) / step_s:.1f} |",
            flush=True,
        )
    dist.barrier()


def _steps(trainer: Trainer, batches: list[TokenBatch], num_steps: int) -> float:
    """Seconds that they take."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(num_steps):
        trainer.step(batches, 1e-4)
    return time.perf_counter() - start


def batches_of(config: TrainStageConfig, seq_len: int) -> list[TokenBatch]:
    """A worker's micro batches of one step."""
    shape = (config.worker_micro_batch_size, seq_len)
    tokens = [torch.randint(1000, shape) for _ in range(config.accumulation_steps)]
    return [TokenBatch(each, each.roll(-1, 1), torch.zeros_like(each)) for each in tokens]


def _state(step: int, num_workers: int) -> TrainingState:
    return TrainingState(
        step=step, num_tokens=0, num_samples=0, optimizer_steps=step, num_workers=num_workers, data={}, train_loss=1.0,
        initial_valid_loss=None, train_time_s=0.0, history={}, versions={},
    )  # fmt: skip


def config_of(options: argparse.Namespace) -> TrainStageConfig:
    """Args: options: model, workers, threads, zero_stage, batch_size, and micro_batch_size where it is less."""
    large = options.model != "quickstart"
    model = yaml.safe_load((PRESETS_DIR / f"{options.model}.yaml").read_text()) if large else QUICKSTART
    return TrainStageConfig.model_validate(
        {
            "kind": "train", "needs": ("tokens",), "model": {"vocab_size": 32_000, **model},
            "global_batch_size": options.batch_size,
            "micro_batch_size": options.micro_batch_size or options.batch_size // options.workers,
            "max_steps": 10**6, "warmup_steps": 0,
            "backend": {"kind": "deepspeed", "zero_stage": options.zero_stage},
            "resources": {"num_workers": options.workers, "cpus_per_worker": options.threads},
        }
    )  # fmt: skip


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_delay", description=__doc__)
    parser.add_argument("--model", default="quickstart", help="quickstart, or a preset: bmojo-130m")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--micro-batch-size", type=int, help="default: a worker's share at once")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of blocks")
    parser.add_argument("--folder", help="where the checkpoints go for the time; default: that of temporary files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
