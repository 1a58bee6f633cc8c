"""Measure real steps on this machine, in processes like training workers but without Ray.

`measure` starts them: python -m pipelines.stages.train.planning.probe FOLDER RANK, one per worker.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from pydantic import Field

from base.config import StrictConfig
from base.errors import UserError
from bmojo import BMojoLM
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import num_gpus, peak_memory, pick
from pipelines.stages.train.environment import environment_of_one_gpu, set_rank
from pipelines.stages.train.planning.steps import MOST_MICRO_BATCHES, Repeats, Steps, stand_in_tokens, take_steps

_SPEC, _RESULT = "probe.json", "steps.json"
_TIMEOUT_S = 900


class Probe(StrictConfig):
    """What is measured."""

    train: TrainStageConfig
    seq_len: int = Field(ge=1)
    first_rows: int | None = Field(None, ge=1, description="Rows of the micro batches of a first step; null: none.")


def measure(train: TrainStageConfig, seq_len: int, first_rows: int | None = None) -> Steps:
    """Take real steps with as many processes as there are workers, on random tokens, and say what a step takes.

    Args:
        train: whose model has a vocab_size; of many micro batches per step the first few are taken.
        first_rows: a first step has micro batches of so many rows, and its peak is noted.
    Raises: UserError: they failed; with the end of what they printed.
    """
    if train.on_neuron:
        raise UserError(
            "Measuring steps starts no NeuronCores. Plan without --measure, and read the first steps of a run instead."
        )
    if train.on_gpu and num_gpus() < train.resources.num_workers:
        raise UserError(
            f"Measuring steps takes {train.resources.num_workers} GPUs (resources.num_workers), and this machine has "
            f"{num_gpus()}. Measure where they are, or plan without --measure."
        )
    share = min(train.accumulation_steps, MOST_MICRO_BATCHES)
    batch = share * train.worker_micro_batch_size * train.resources.num_workers
    shortened = train.model_copy(update={"global_batch_size": batch})
    with tempfile.TemporaryDirectory(prefix="bmojo-probe-") as name:
        folder = Path(name)
        (folder / _SPEC).write_text(Probe(train=shortened, seq_len=seq_len, first_rows=first_rows).model_dump_json())
        processes = [_start(folder, rank, train.on_gpu) for rank in range(train.resources.num_workers)]
        try:
            outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in processes]
        except subprocess.TimeoutExpired:
            raise UserError(f"Measuring steps took more than {_TIMEOUT_S} s.") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for process, output in zip(processes, outputs, strict=True):
            if process.returncode:
                raise UserError(f"Measuring steps failed: {' '.join(output.strip().splitlines()[-3:])}")
        steps = Steps.model_validate_json((folder / _RESULT).read_text())
    return steps.model_copy(update={"step_s": steps.step_s * train.accumulation_steps / share})


def _start(folder: Path, rank: int, on_gpu: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.stages.train.planning.probe", str(folder), str(rank)]
    own_gpu = environment_of_one_gpu(rank, num_gpus()) if on_gpu else None
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own_gpu)


def main(folder: Path, rank: int) -> None:
    """One worker."""
    probe = Probe.model_validate_json((folder / _SPEC).read_text())
    config, num_workers = probe.train, probe.train.resources.num_workers
    set_rank(rank, num_workers)
    from pipelines.stages.train.worker import prepare_process  # which imports Ray Train, as a real worker does

    device = pick(config.on_gpu)
    dist.init_process_group(
        "nccl" if config.on_gpu else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_workers
    )
    prepare_process(config, rank)
    start_bytes = peak_memory(device)
    assert config.model.vocab_size is not None
    model = BMojoLM(config.model)
    model.checkpoint_activations(config.activation_checkpointing)
    trainer = config.backend.start(model, config, device)
    micro_batches = stand_in_tokens(config, probe.seq_len, config.model.vocab_size, rank)
    first_peak_bytes = 0
    if probe.first_rows is not None:
        few = [batch.map(lambda tensor: tensor[: probe.first_rows]) for batch in micro_batches]
        first_peak_bytes = take_steps(trainer, config, few, start_bytes, Repeats(0, 1, 0.0)).peak_bytes
    steps = take_steps(trainer, config, micro_batches, start_bytes, Repeats())
    steps = steps.model_copy(update={"first_peak_bytes": first_peak_bytes})
    if rank == 0:
        (folder / _RESULT).write_text(steps.model_dump_json())
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
