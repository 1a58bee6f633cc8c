"""Two worker processes that observe the Neuron backend's trainer: rehearsed on the CPU, or on the simulated device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from bmojo import BMojoLM
from data.shards import TokenBatch
from pipelines.stages.train.backends.neuron_config import NeuronConfig
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU
from pipelines.stages.train.guards.replicas import differing_replicas
from pipelines.stages.train.trainer import Trainer
from tests.pipelines.stages.train.trainer_contract import (
    LR,
    NUM_STEPS,
    Observed,
    Tensors,
    initial_model,
    micro_batches,
    observe,
    steps,
)

NUM_WORKERS = 2
ROOT = Path(__file__).resolve().parents[4]
SIMULATED = ROOT / "tests" / "neuron_device"
DEVICES = ("cpu", "neuron")
WAYS = ("zero1", "fsdp2")
"""What is sharded how, on each device."""


class Result:
    """What both workers saw, by `parallel`, and the named tensors at the end."""

    def __init__(self, folder: Path) -> None:
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(NUM_WORKERS)]
        self.found: dict[str, list[dict[str, Any]]] = {name: [rank[name] for rank in ranks] for name in WAYS}
        self.observed = {name: [Observed(**rank[name]["observed"]) for rank in ranks] for name in WAYS}
        self.tensors: dict[str, Tensors] = {name: load_file(folder / f"{name}.safetensors") for name in WAYS}


def run_workers(config: TrainStageConfig, folder: Path, device: str) -> Result:
    """Start both in fresh interpreters, as a device can be registered once in a process, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config.json").write_text(config.model_dump_json())
    processes = []
    for rank in range(NUM_WORKERS):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_WORKERS), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join([str(ROOT), str(SIMULATED)]),
        }  # fmt: skip
        command = [sys.executable, "-m", __name__, str(folder), device]
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT))
    codes = [process.wait() for process in processes]
    assert codes == [0] * NUM_WORKERS
    return Result(folder)


def _observe(folder: Path, device_type: str) -> None:
    from pipelines.neuron import runtime

    torch.set_num_threads(1)
    device, group = CPU, "gloo"
    if device_type == runtime.TYPE:
        runtime.require()
        group = runtime.PROCESS_GROUP
    dist.init_process_group(group)
    if device_type == runtime.TYPE:
        device = runtime.device()
    rank = dist.get_rank()
    config = TrainStageConfig.model_validate_json((folder / "config.json").read_text())
    found: dict[str, Any] = {}
    started: list[Trainer] = []

    def start(model: BMojoLM, config: TrainStageConfig) -> Trainer:
        started.append(config.backend.start(model, config, device))
        return started[-1]

    for parallel in WAYS:
        backend = NeuronConfig(kind="neuron", device="cpu", parallel=parallel, compile="none")
        settings = config.model_copy(update={"backend": backend})
        started.clear()
        seen, end = observe(start, settings)
        whole = sum(value.numel() for key, value in end.items() if key.startswith("exp_avg/"))
        found[parallel] = {
            "observed": seen.as_json(),
            "state_share": _held(started[0], "exp_avg/") / whole,
            "parameter_share": sum(_local(p).numel() for p in started[0].model.parameters()) / whole,
            "replicas": [list(each[:2]) for each in differing_replicas(started[0])],
            "averages": _averages(start, settings),
            "bf16": _bf16(start, settings),
            "marked": _marked(start, settings),
        }
        if device_type == runtime.TYPE:
            found[parallel]["operators"] = _operators(started[0], settings)
            spoiled = initial_model(settings)
            spoiled.embedding.register_forward_hook(lambda *given: given[2] * given[2].sum().item() ** 0)
            found[parallel]["operators_with_item"] = _operators(start(spoiled, settings), settings)
            found[parallel]["faults"] = _faults(start, settings, device)
        if rank == 0:
            save_file(end, folder / f"{parallel}.safetensors")
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _held(trainer: Trainer, prefix: str) -> int:
    return sum(piece.values.numel() for key, piece in trainer.pieces().items() if key.startswith(prefix))


def _local(parameter: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local


def _averages(start: Any, config: TrainStageConfig) -> dict[str, bool]:
    """Whether averaged weights come in, count in losses, and go again."""
    kept = config.model_copy(update={"ema_decay": 0.8})
    trainer = start(initial_model(kept), kept)
    steps(trainer, kept, range(2))
    batch = micro_batches(kept, 0)[0]
    before = trainer.token_losses(batch)
    with trainer.averaged():
        inside = trainer.token_losses(batch)
    return {
        "counts": not torch.equal(before, inside),
        "goes": torch.equal(before, trainer.token_losses(batch)),
    }


def _bf16(start: Any, config: TrainStageConfig) -> dict[str, Any]:
    settings = config.model_copy(update={"precision": "bf16"})
    trainer = start(initial_model(settings), settings)
    losses = [float(trainer.step(micro_batches(settings, number), LR).loss) for number in range(NUM_STEPS)]
    return {"losses": losses, "dtypes": sorted({str(trainer.tensor(key).dtype) for key in trainer.shapes})}


def _marked(start: Any, config: TrainStageConfig) -> list[float]:
    """Losses of a model that keeps the tokens that are marked: the optional part of a batch."""
    oracle = config.model_copy(update={"model": config.model.replace(selection="oracle")})
    trainer = start(initial_model(oracle), oracle)
    batches = [marked(batch) for batch in micro_batches(oracle, 0)]
    return [float(trainer.step(batches, LR).loss) for _ in range(2)]


def marked(batch: TokenBatch) -> TokenBatch:
    """Every fifth token is one that answers are read off."""
    return batch._replace(wanted_bt=torch.arange(batch.tokens_bt.shape[1]).expand_as(batch.tokens_bt) % 5 == 0)


def _operators(trainer: Trainer, config: TrainStageConfig) -> dict[str, int]:
    """What ran on the device in one step."""
    import torch_neuronx

    torch_neuronx.clear_op_tracking()
    trainer.step(micro_batches(config, 0), LR)
    counts: dict[str, int] = torch_neuronx.get_executed_ops()
    return counts


def _faults(start: Any, config: TrainStageConfig, device: torch.device) -> dict[str, str]:
    """What is said when a layer mixes devices, or asks for what the device has not."""
    planted = {
        "tensor of the CPU": lambda x: x + torch.ones(x.shape[-1]),
        "float64": lambda x: x.double().float(),
    }
    found = {}
    for name, fault in planted.items():
        model = initial_model(config)
        model.embedding.register_forward_hook(lambda *given, fault=fault: fault(given[2]))
        trainer = start(model, config)
        try:
            trainer.step(micro_batches(config, 0), LR)
        except RuntimeError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    _observe(Path(sys.argv[1]), sys.argv[2])
