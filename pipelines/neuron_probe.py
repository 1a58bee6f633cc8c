"""A process of one step of `bmojo doctor --neuron`: python -m pipelines.neuron_probe STEP SPEC FOLDER.

The order is that of a training: the process group first, then the device.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from bmojo import BMojoLM, ModelConfig
from bmojo.compiled import compile_parts
from data.shards import TokenBatch
from pipelines.neuron import runtime
from pipelines.neuron_doctor import ProbeSpec
from pipelines.stages.train.backends.neuron import NeuronTrainer
from pipelines.stages.train.backends.neuron_config import NeuronConfig
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.device import CPU, autocast

_LR = 1e-3


def main(step: str, spec: ProbeSpec, folder: Path) -> None:
    """Run a step and write what this rank found."""
    runtime.require()
    dist.init_process_group(runtime.PROCESS_GROUP)
    found = PROBES[step](spec)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def probe_device(spec: ProbeSpec) -> dict[str, Any]:
    """A sum on the device."""
    device = runtime.device()
    return {"device": str(device), "sum": float((torch.ones(2, device=device) * 2).sum().cpu())}


def probe_compile(spec: ProbeSpec) -> dict[str, Any]:
    """The first forward and backward, which compile, and the second."""
    device = runtime.device()
    model = _model(spec)
    runtime.move(model, device)
    compile_parts(model, runtime.compiler())
    batch = [tensor.int().to(device) for tensor in _tensors(spec, 0)]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        loss = model(*batch).loss
        assert loss is not None
        loss.backward()
        runtime.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"first_s": seconds[0], "then_s": seconds[1], "fallback": runtime.fallback_ops()}


def probe_numerics(spec: ProbeSpec) -> dict[str, Any]:
    """Loss and gradients of the compiled blocks against the host's in float32: alone, in bfloat16, and of three micro
    batches added up."""
    device = runtime.device()
    loss, expected = _gradients(spec, CPU, num_batches=1)
    found_loss, fp32 = _gradients(spec, device, num_batches=1)
    _, bf16 = _gradients(spec, device, num_batches=1, bf16=True)
    _, expected_of_three = _gradients(spec, CPU, num_batches=3)
    _, three = _gradients(spec, device, num_batches=3)
    worst_fp32, worst_bf16 = _worst(fp32, expected), _worst(bf16, expected)
    return {
        "loss": abs(found_loss - loss) / abs(loss),
        "fp32": worst_fp32[0],
        "fp32_name": worst_fp32[1],
        "bf16": worst_bf16[0],
        "bf16_name": worst_bf16[1],
        "three": _worst(three, expected_of_three)[0],
    }


def probe_collective(spec: ProbeSpec) -> dict[str, Any]:
    """Sums and gathers over the cores, and 64-bit sums beside them on the host."""
    device, rank, num_ranks = runtime.device(), dist.get_rank(), dist.get_world_size()
    sums = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(sums)
    gathered = torch.empty(num_ranks * 4, device=device)
    dist.all_gather_single(gathered, torch.full((4,), float(rank), device=device))
    on_host = torch.tensor(2**40 + rank, dtype=torch.int64)
    dist.all_reduce(on_host)
    total = num_ranks * (num_ranks + 1) / 2
    is_right = bool((sums.cpu() == total).all()) and gathered.cpu().tolist() == [
        float(number // 4) for number in range(4 * num_ranks)
    ]
    is_right &= int(on_host) == num_ranks * 2**40 + num_ranks * (num_ranks - 1) // 2
    return {"num_ranks": num_ranks, "is_right": is_right}


def probe_throughput(spec: ProbeSpec) -> dict[str, Any]:
    """Steps of the trainer on one batch, whose loss must fall, timed after the first two."""
    config = TrainStageConfig.model_validate(
        {
            "kind": "train", "model": spec.model(), "global_batch_size": 2 * spec.rows, "micro_batch_size": spec.rows,
            "max_steps": spec.num_steps, "warmup_steps": 1, "backend": {"kind": "neuron"},
            "resources": {"neuron_cores_per_worker": 1},
        }
    )  # fmt: skip
    assert isinstance(config.backend, NeuronConfig)
    counted = _CountedCompiler()
    trainer = NeuronTrainer(_model(spec), config, config.backend, runtime.device(), counted)
    batches = [_batch(spec, number) for number in range(2)]
    losses = [float(trainer.step(batches, _LR).loss) for _ in range(2)]
    graphs, start = counted.num_graphs(), time.perf_counter()
    losses += [float(trainer.step(batches, _LR).loss) for _ in range(spec.num_steps - 2)]
    runtime.synchronize()
    num_tokens = (spec.num_steps - 2) * 2 * spec.rows * spec.seq_len
    return {
        "tokens_per_s": num_tokens / (time.perf_counter() - start),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "graphs_after_warm_up": counted.num_graphs() - graphs,
    }


class _CountedCompiler:
    """TorchNeuron's compiler, and how many graphs Dynamo has made so far."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return runtime.compiler()(function)

    def num_graphs(self) -> int:
        return int(counters["stats"]["unique_graphs"])


def _model(spec: ProbeSpec) -> BMojoLM:
    model = BMojoLM(ModelConfig.model_validate(spec.model()))
    model.init_weights(seed=0)
    return model


def _batch(spec: ProbeSpec, number: int) -> TokenBatch:
    """Random tokens in two documents per row, always the same."""
    generator = torch.Generator().manual_seed(number)
    shape = (spec.rows, spec.seq_len)
    tokens = torch.randint(spec.vocab_size, shape, generator=generator)
    documents = (torch.arange(spec.seq_len) >= spec.seq_len // 3).long().expand(shape).contiguous()
    return TokenBatch(tokens, torch.randint(spec.vocab_size, shape, generator=generator), documents)


def _tensors(spec: ProbeSpec, number: int) -> tuple[torch.Tensor, ...]:
    """Tokens, targets and documents."""
    return _batch(spec, number)[:3]


def _gradients(
    spec: ProbeSpec, device: torch.device, num_batches: int, bf16: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss and its gradients, weighted after the backward, on the host."""
    model = _model(spec)
    if device != CPU:
        runtime.move(model, device)
        compile_parts(model, runtime.compiler())
    losses: list[float] = []
    sums: dict[str, torch.Tensor] = {}
    for number in range(num_batches):
        batch = [(tensor if device == CPU else tensor.int()).to(device) for tensor in _tensors(spec, number)]
        with autocast(device, bf16):
            loss = model(*batch).loss
        assert loss is not None
        loss.backward()
        losses.append(float(loss.detach().cpu()))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.cpu() / num_batches
                sums[name] = sums[name] + gradient if name in sums else gradient
                parameter.grad = None
    return sum(losses) / num_batches, sums


def _worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error of a gradient, and whose it is."""
    errors = {
        name: float((found[name] - value).norm() / value.norm().clamp(min=1e-12)) for name, value in expected.items()
    }
    return max((error, name) for name, error in errors.items())


PROBES: dict[str, Callable[[ProbeSpec], dict[str, Any]]] = {
    "device": probe_device,
    "compile": probe_compile,
    "numerics": probe_numerics,
    "collective": probe_collective,
    "throughput": probe_throughput,
}

if __name__ == "__main__":
    main(sys.argv[1], ProbeSpec(**json.loads(sys.argv[2])), Path(sys.argv[3]))
