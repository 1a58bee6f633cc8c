"""ZeRO really shards, every stage takes the same steps, and optimizer moments survive being written and put back.

All in one pair of processes: starting them (imports) is most of the time.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from pipelines.stages.train.config import TrainStageConfig

NUM_WORKERS = 2
STAGES = (0, 1, 2, 3)


def _train(trainer: Any, batches: list[torch.Tensor], lr: float) -> list[float]:
    """One step a batch; returns the gradient norms."""
    norms = []
    for tokens_bt in batches:
        doc_ids_bt = torch.zeros_like(tokens_bt)
        trainer.backward(tokens_bt, tokens_bt.roll(-1, dims=1), doc_ids_bt, weight=1.0)
        norms.append(trainer.finish_micro_batch(lr))
    return norms


def _snapshot(trainer: Any) -> dict[str, torch.Tensor]:
    values = {}
    for name in trainer.shapes:
        values[f"param/{name}"] = trainer.whole_parameter(name).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            values[f"{moment}/{name}"] = trainer.whole_moment(name, moment).clone()
    return values


def _worker(rank: int, port: int, config_json: str, out: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_WORKERS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from bmojo import BMojoLM
    from pipelines.stages.train import zero

    zero.quiet_logs()
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(rank)
    results: dict[str, Any] = {}
    for stage in STAGES:
        config = TrainStageConfig.model_validate_json(config_json).model_copy(update={"zero_stage": stage})
        batches = [torch.randint(0, 60, (2, 64), generator=generator.manual_seed(rank + i)) for i in range(4)]
        model = BMojoLM(config.model)
        trainer = zero.ZeroTrainer(model, config, NUM_WORKERS, device)
        num_params = sum(shape.numel() for shape in trainer.shapes.values())
        norms = _train(trainer, batches[:2], lr=1e-2)
        halfway = _snapshot(trainer)
        halfway_steps = trainer.optimizer_steps
        norms += _train(trainer, batches[2:], lr=1e-2)
        end = _snapshot(trainer)

        resumed_model = BMojoLM(config.model)
        with torch.no_grad():
            for name, parameter in resumed_model.named_parameters():
                parameter.copy_(halfway[f"param/{name}"])
        resumed = zero.ZeroTrainer(resumed_model, config, NUM_WORKERS, device)
        for name in resumed.shapes:
            for moment in zero.MOMENTS:
                resumed.set_moment(name, moment, halfway[f"{moment}/{name}"])
        resumed.set_optimizer_steps(halfway_steps)
        put_back = _snapshot(resumed)
        _train(resumed, batches[2:], lr=1e-2)
        resumed_end = _snapshot(resumed)
        results[str(stage)] = {
            "norms": norms,
            "local_share": trainer.local_optimizer_numel() / num_params,
            "optimizer_steps": [halfway_steps, resumed.optimizer_steps],
            "moments_move": all(
                float(halfway[f"exp_avg/{n}"].abs().max()) > 0 for n in trainer.shapes if "head" not in n
            ),
            "put_back_exactly": all(torch.equal(put_back[key], halfway[key]) for key in halfway),
            "goes_on_bitwise": all(torch.equal(resumed_end[key], end[key]) for key in end),
            "first_values": {key: end[key].flatten()[:3].tolist() for key in list(end)[:6]},
        }
    config = TrainStageConfig.model_validate_json(config_json).model_copy(update={"precision": "bf16"})
    batches = [torch.randint(0, 60, (2, 64), generator=generator.manual_seed(rank + i)) for i in range(4)]
    trainer = zero.ZeroTrainer(BMojoLM(config.model), config, NUM_WORKERS, device)
    results["bf16"] = {
        "norms": _train(trainer, batches, lr=1e-2),
        "dtypes": sorted({str(value.dtype) for value in _snapshot(trainer).values()}),
        "parameter_dtypes": sorted({str(parameter.dtype) for parameter in trainer.model.parameters()}),
    }
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def by_stage(
    train_config: Callable[..., TrainStageConfig], tiny_model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What two workers found for each ZeRO stage."""
    config = train_config(
        model=tiny_model | {"vocab_size": 64}, global_batch_size=4, micro_batch_size=2, resources={"num_workers": 2}
    )
    out = tmp_path_factory.mktemp("zero") / "results.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, config.model_dump_json(), str(out)), nprocs=NUM_WORKERS)
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_each_worker_holds_its_share_of_the_optimizer_state(by_stage: dict[str, Any], stage: int) -> None:
    share = by_stage[str(stage)]["local_share"]
    assert share == pytest.approx(1.0 if stage == 0 else 0.5, abs=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_moments_are_put_back_and_training_goes_on_bitwise(by_stage: dict[str, Any], stage: int) -> None:
    found = by_stage[str(stage)]
    assert found["moments_move"]
    assert found["put_back_exactly"]
    assert found["goes_on_bitwise"]
    assert found["optimizer_steps"] == [2, 4]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_takes_the_same_steps(by_stage: dict[str, Any], stage: int) -> None:
    assert by_stage[str(stage)]["norms"] == pytest.approx(by_stage["0"]["norms"], rel=1e-4)
    for key, values in by_stage["0"]["first_values"].items():
        assert by_stage[str(stage)]["first_values"][key] == pytest.approx(values, rel=1e-3, abs=1e-5), key


def test_bf16_leaves_parameters_and_moments_in_float32(by_stage: dict[str, Any]) -> None:
    assert by_stage["bf16"]["parameter_dtypes"] == by_stage["bf16"]["dtypes"] == ["torch.float32"]
    assert by_stage["bf16"]["norms"] == pytest.approx(by_stage["1"]["norms"], rel=0.1)
    assert by_stage["bf16"]["norms"] != by_stage["1"]["norms"], "autocast must have changed something"
