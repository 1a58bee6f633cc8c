"""Two worker processes that observe DeepSpeed's trainer under each ZeRO stage.

All in one pair of processes: starting them (imports) is most of the time.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bmojo import BMojoLM
from bmojo.fields import ActivationCheckpointing
from bmojo.hollow import fill_from, hollow_model
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU
from pipelines.stages.train.guards.replicas import differing_replicas
from pipelines.stages.train.optimizers.config import MuonConfig
from pipelines.stages.train.optimizers.exchange import Exchange, Extent
from pipelines.stages.train.trainer import Trainer
from tests.pipelines.stages.train import forked
from tests.pipelines.stages.train.trainer_contract import (
    HALFWAY,
    LR,
    NUM_STEPS,
    Observed,
    Start,
    Tensors,
    equal,
    initial_model,
    micro_batches,
    observe,
    snapshot,
    steps,
)

NUM_WORKERS = 2
ZERO_STAGES = (0, 1, 2, 3)
BF16_STAGES = (0, 1)


class Result:
    """What both workers saw, by ZeRO stage, and the named tensors at the end, which rank 0 wrote down."""

    def __init__(self, folder: Path) -> None:
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(NUM_WORKERS)]
        self.observed = {stage: [Observed(**rank["observed"][str(stage)]) for rank in ranks] for stage in ZERO_STAGES}
        self.tensors: dict[int, Tensors] = {
            stage: load_file(folder / f"zero-{stage}.safetensors") for stage in ZERO_STAGES
        }
        self.local_share: dict[int, list[float]] = {
            stage: [rank["local_share"][str(stage)] for rank in ranks] for stage in ZERO_STAGES
        }
        self.bf16: dict[int, Any] = {stage: ranks[0]["bf16"][str(stage)] for stage in BF16_STAGES}
        self.held_bytes: dict[int, list[int]] = {
            stage: [rank["held_bytes"][str(stage)] for rank in ranks] for stage in ZERO_STAGES
        }
        self.is_recomputed_alike: dict[int, bool] = {
            stage: all(rank["is_recomputed_alike"][str(stage)] for rank in ranks) for stage in ZERO_STAGES
        }
        self.engine: dict[int, dict[str, Any]] = {stage: ranks[0]["engine"][str(stage)] for stage in ZERO_STAGES}
        self.muon = {stage: ByMuon(ranks, stage, folder) for stage in ZERO_STAGES}
        self.exchange_is_exact = all(rank["exchange_is_exact"] for rank in ranks)
        self.replicas: dict[int, list[Any]] = {
            stage: [r["replicas"][str(stage)] for r in ranks] for stage in ZERO_STAGES
        }
        self.scalars_read: dict[int, int] = {stage: ranks[0]["scalars_read"][str(stage)] for stage in ZERO_STAGES}


class ByMuon:
    """What the workers saw of training by Muon, with averages of the weights."""

    def __init__(self, ranks: list[dict[str, Any]], stage: int, folder: Path) -> None:
        found = [rank["muon"][str(stage)] for rank in ranks]
        self.norms: list[float] = found[0]["norms"]
        self.resumes_bitwise = all(of_rank["resumes_bitwise"] for of_rank in found)
        self.averages_change_places = all(of_rank["averages_change_places"] for of_rank in found)
        self.skips_without_a_trace = all(of_rank["skips_without_a_trace"] for of_rank in found)
        self.weights_by_step = [load_file(folder / f"muon-{stage}-{step}.safetensors") for step in range(NUM_STEPS + 1)]
        self.tensors: Tensors = load_file(folder / f"muon-{stage}.safetensors")


def muon_config(config: TrainStageConfig) -> TrainStageConfig:
    """The settings of training by Muon."""
    changes = {"groups": (), "optimizer": MuonConfig(kind="muon"), "ema_decay": 0.8}
    return config.model_copy(update=changes)


def run_workers(config: TrainStageConfig, folder: Path) -> Result:
    """Start both, wait for them and read what they wrote into the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked.run(_worker, (port, config.model_dump_json(), folder), NUM_WORKERS)
    return Result(folder)


def _worker(rank: int, port: int, config_json: str, folder: Path) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_WORKERS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    config = TrainStageConfig.model_validate_json(config_json)
    by_stage = (
        "observed", "muon", "local_share", "held_bytes", "is_recomputed_alike", "engine", "scalars_read", "replicas",
        "bf16",
    )  # fmt: skip
    found: dict[str, dict[int, Any]] = {name: {} for name in by_stage}
    started: list[Trainer] = []

    def start(model: BMojoLM, config: TrainStageConfig) -> Trainer:
        parts: Iterable[nn.Module] = ()
        if config.backend.shards_parameters:  # as a worker does it: no model is whole
            values = {name: value.detach() for name, value in model.named_parameters()}
            hollow = hollow_model(config.model)
            hollow.embedding._forward_hooks = model.embedding._forward_hooks  # by which the contract spoils steps
            model, parts = hollow, fill_from(hollow, values.__getitem__)
        started.append(config.backend.start(model, config, CPU, parts))
        return started[-1]

    for stage in ZERO_STAGES:
        started.clear()
        backend = config.backend.model_copy(update={"zero_stage": stage})
        seen, end = observe(start, config.model_copy(update={"backend": backend}))
        found["observed"][stage] = seen.as_json()
        found["local_share"][stage] = _local_share(started[0])
        found["held_bytes"][stage] = _held_bytes(started[0])
        with _ScalarsRead() as read:
            started[0].step(micro_batches(config, 0), lr=0.0)
        found["scalars_read"][stage] = read.count
        found["engine"][stage] = _engine_settings(started[0])
        found["is_recomputed_alike"][stage] = _is_recomputed_alike(
            start, config.model_copy(update={"backend": backend}), seen.norms, end
        )
        found["muon"][stage] = _train_by_muon(
            start, muon_config(config.model_copy(update={"backend": backend})), folder
        )
        if rank == 0:
            save_file(end, folder / f"zero-{stage}.safetensors")
        found["replicas"][stage] = _replicas_with_flipped_bits(started[0], rank)
    for stage in BF16_STAGES:
        backend = config.backend.model_copy(update={"zero_stage": stage})
        bf16 = config.model_copy(update={"precision": "bf16", "backend": backend})
        trainer: Any = start(initial_model(bf16), bf16)
        results = [trainer.step(micro_batches(bf16, number), LR) for number in range(NUM_STEPS)]
        found["bf16"][stage] = {
            "norms": [float(result.grad_norm) for result in results],
            "losses": [float(result.loss) for result in results],
            "dtypes": sorted({str(trainer.tensor(key).dtype) for key in trainer.shapes}),
            "parameter_dtypes": sorted({str(parameter.dtype) for parameter in trainer.model.parameters()}),
        }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found | {"exchange_is_exact": _exchange_is_exact(rank)}))
    torch.distributed.barrier()


def _is_recomputed_alike(start: Start, config: TrainStageConfig, norms: list[float], end: Tensors) -> bool:
    """Whether steps that compute mixers or blocks again, by ZeRO stage, end with the bits of those that do not."""
    parts: tuple[ActivationCheckpointing, ...] = ("attention", "block")
    model = initial_model(config)
    model.checkpoint_activations(parts[config.backend.zero_stage % 2])
    trainer = start(model, config)
    return all([steps(trainer, config, range(NUM_STEPS)) == norms, equal(snapshot(trainer), end)])


def _train_by_muon(start: Start, config: TrainStageConfig, folder: Path) -> dict[str, Any]:
    """Steps with a step that is left out among them, and the same again from halfway."""
    stage, first = config.backend.zero_stage, torch.distributed.get_rank() == 0
    model, factor = initial_model(config), 1.0
    model.embedding.register_forward_hook(lambda *given: given[2] * factor)
    trainer = start(model, config)
    norms: list[float] = []
    snapshots = [snapshot(trainer)]
    for step in range(NUM_STEPS):
        norms += steps(trainer, config, range(step, step + 1))
        snapshots.append(snapshot(trainer))
        if step == 0:
            factor = float("nan")
            steps(trainer, config, range(7, 8))
            factor = 1.0
            skips = equal(snapshot(trainer), snapshots[-1])
    with trainer.averaged():
        swapped = snapshot(trainer)
    back = snapshot(trainer)
    weights = [key for key in swapped if key.startswith("param/")]
    changed = all(torch.equal(swapped[key], back[key.replace("param/", "ema/")]) for key in weights)
    resumed = start(initial_model(config), config)
    halfway = snapshots[HALFWAY]
    resumed.load(lambda key, at, numel: halfway[key].flatten()[at : at + numel], HALFWAY)
    steps(resumed, config, range(HALFWAY, NUM_STEPS))
    if first:
        save_file(snapshots[-1], folder / f"muon-{stage}.safetensors")
        for number, tensors in enumerate(snapshots):
            save_file({key: tensors[key] for key in weights}, folder / f"muon-{stage}-{number}.safetensors")
    return {
        "norms": norms,
        "resumes_bitwise": equal(snapshot(resumed), snapshots[-1]),
        "averages_change_places": changed and equal(back, snapshots[-1]),
        "skips_without_a_trace": skips,
    }


def _exchange_is_exact(rank: int) -> bool:
    """Whether pieces of odd sizes become whole matrices somewhere, and the results come back as pieces."""
    shapes = {"even": (4, 6), "one": (1, 1), "odd": (5, 7), "whole": (3, 3), "of the first": (2, 9)}
    cuts = {"even": 12, "one": 0, "odd": 11, "whole": 9, "of the first": 17}
    wholes = {
        name: torch.arange(float(a * b)).view(a, b) + number for number, (name, (a, b)) in enumerate(shapes.items())
    }
    held = {}
    for name, cut in cuts.items():
        start, end = (0, cut) if rank == 0 else (cut, wholes[name].numel())
        if start < end:
            held[name] = Extent(start, end - start)
    exchange = Exchange({name: whole.shape for name, whole in wholes.items()}, held)
    pieces = {name: wholes[name].flatten()[at : at + numel] for name, (at, numel) in held.items()}
    found = exchange.apply(lambda matrix: matrix.flip(0) @ matrix.mT @ matrix, pieces, list(wholes))
    expected = {name: (whole.flip(0) @ whole.mT @ whole).flatten() for name, whole in wholes.items()}
    return equal(found, {name: expected[name][at : at + numel] for name, (at, numel) in held.items()})


def _engine_settings(trainer: Any) -> dict[str, Any]:
    """What DeepSpeed goes by, in its own words."""
    engine = trainer._engine
    group = engine.seq_data_parallel_group
    return {
        "gradient_clipping": engine.gradient_clipping(),
        "clip_grad": getattr(engine.optimizer, "clip_grad", None),
        "dtype": str(getattr(engine.optimizer, "dtype", torch.float32)),
        "timeout_s": group._get_backend(CPU).options._timeout.total_seconds(),
        "is_world": group is torch.distributed.group.WORLD,
    }


def _replicas_with_flipped_bits(trainer: Trainer, rank: int) -> list[list[list[Any]]]:
    """What is found with no flipped bit, and with one in rank 1's copy of the first and of the last replica."""
    found = [differing_replicas(trainer)]
    replicas = list(trainer.replicas().values())
    for value in replicas[:1] + replicas[-1:]:
        bits = value.view(-1).view(torch.int32)
        bits[-1] ^= (1 << 3) * rank
        found.append(differing_replicas(trainer))
        bits[-1] ^= (1 << 3) * rank
    return [[list(each[:2]) for each in one] for one in found]


class _ScalarsRead(TorchDispatchMode):
    """Counts what Python learns of tensors' values: on a GPU it would wait for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def _local_share(trainer: Any) -> float:
    """Share of the elements of the first moment that this rank holds: what ZeRO shards."""
    here = sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values())
    return float(here) / sum(shape.numel() for key, shape in trainer.shapes.items() if key.startswith("exp_avg/"))


def _held_bytes(trainer: Any) -> int:
    """Bytes of the memory in which this rank keeps parameters, the copies that the optimizer updates, and its state."""
    optimizer = trainer.optimizer
    tensors = [*trainer.model.parameters(), *(getattr(p, "ds_tensor", p) for p in trainer.model.parameters())]
    tensors += [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
