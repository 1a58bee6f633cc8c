"""Training step on a GPU: forward + backward + AdamW under bfloat16 autocast, B'MOJO against models of equal size.

All models but llama, which is transformers' with SDPA, are ours, and differ in their layers' mixers. Every model runs
eagerly, as two CUDA graphs (bmojo.graphs) and compiled by torch, as `--ways` asks. Steps of a model are timed one after
the other, between CUDA events; the table shows medians. `--check` first compares graphs with eager steps to the bit,
and the loss with that of plain torch.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from benchmarks._peers import PLAIN, build, has_gpu, loss_of, num_params
from bmojo import BMojoLM, ModelConfig
from bmojo.counting import count
from bmojo.fields import ActivationCheckpointing
from bmojo.graphs import GraphedLoss, uncached
from bmojo.mixers import MIXERS
from kernels.operator import use

MODELS = (*dict.fromkeys(("bmojo", *MIXERS)), PLAIN, "llama")
WAYS = ("eager", "graphs", "compiled")
NOTHING = "nothing"
SIZES = {  # by millions of parameters
    "116m": {"num_layers": 12, "d_model": 768, "d_ff": 1408, "num_heads": 12},
    "370m": {"num_layers": 24, "d_model": 1024, "d_ff": 2368, "num_heads": 16},
    "1.4b": {"num_layers": 24, "d_model": 2048, "d_ff": 5056, "num_heads": 32},
}
HEADER = """\
| model | way | recomputed | parameters | seq_len | tokens/s | step, ms | lowest .. highest | of the peak | memory, GiB | of it allocated | bmojo is x times as fast |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""  # noqa: E501  # a row of a table cannot be broken

Way = Literal["eager", "graphs", "compiled"]


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of each timed step, and the most memory that was taken from the device and allocated meanwhile;
    no steps: it failed."""

    times_ms: list[float]
    peak_bytes: int
    failure: str = ""
    allocated_bytes: int = 0


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if not has_gpu(cpu_benchmark="train_step"):
        return 2
    config = config_of(options)
    with torch.device("meta"):
        target = num_params(BMojoLM(config))
    peak = matmul_peak_flops()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16 matmul peak {peak / 1e12:.0f} TFLOP/s")
    print(f"{options.tokens} tokens per step; {config.num_layers} layers, d_model {config.d_model}")
    if options.check:
        print(check(config, options))
    print(f"\n{HEADER}")
    for seq_len in options.seq_len:
        ours: float | None = None
        for name, part, way in product(options.models, options.recompute, options.ways):
            model = BMojoLM(config) if name == "bmojo" else build(name, config, target)
            if isinstance(model, BMojoLM):
                recompute(model, part)
            measured = measure(model.cuda(), name, way, seq_len, options)
            flops = count(model.config, seq_len).train_flops_per_token if isinstance(model, BMojoLM) else None
            if name == "bmojo" and measured.times_ms and ours is None:
                ours = statistics.median(measured.times_ms)
            row = row_of(measured, options.tokens, None if flops is None else flops / peak, ours)
            print(f"| {name} | {way} | {part} | {num_params(model):,} | {seq_len} | {row} |", flush=True)
            del model
    return 0


def recompute(model: BMojoLM, part: str) -> None:
    """Choose what its backward computes again."""
    model.checkpoint_activations("none" if part == NOTHING else part)  # type: ignore[arg-type]  # argparse checked it
    if part == NOTHING:
        model.made_again = "nothing"


def measure(model: nn.Module, name: str, way: Way, seq_len: int, options: argparse.Namespace) -> Measurement:
    """Time steps of one model after some to warm up; memory is freed afterwards."""
    _free()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape, events = (options.tokens // seq_len, seq_len), []
    try:
        with use("torch") if name == PLAIN else nullcontext():
            loss = loss_function(model, way)
            for repeat in range(options.repeats + 3):
                if repeat == 2:
                    torch.cuda.reset_peak_memory_stats()
                tokens_bt = torch.randint(options.vocab_size, shape, device="cuda")
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                step(loss, optimizer, tokens_bt)
                end.record()
                if repeat > 2:
                    events.append((start, end))
            torch.cuda.synchronize()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return Measurement([], 0, str(error).splitlines()[0][:60])
    times_ms = [start.elapsed_time(end) for start, end in events]
    held = torch.cuda.memory_reserved() if way == "graphs" else 0  # what graphs work in is not counted as allocated
    allocated = torch.cuda.max_memory_allocated()
    return Measurement(times_ms, max(held, allocated), allocated_bytes=allocated)


def loss_function(model: nn.Module, way: Way) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of tokens and targets, run in that way."""

    def loss(tokens_bt: Tensor, targets_bt: Tensor) -> Tensor:
        return loss_of(model, tokens_bt, targets_bt)

    if way == "compiled":
        return torch.compile(loss, fullgraph=isinstance(model, BMojoLM))
    return GraphedLoss(loss, list(model.parameters())) if way == "graphs" else uncached(loss)


def row_of(measured: Measurement, tokens: int, flops_of_peak: float | None, ours: float | None) -> str:
    """The columns after the length; flops_of_peak: FLOPs per token as a share of the peak per second."""
    if not measured.times_ms:
        return f"{measured.failure} |  |  |  |  |  | "
    median = statistics.median(measured.times_ms)
    rate = tokens / median * 1e3
    share = "" if flops_of_peak is None else f"{flops_of_peak * rate:.1%}"
    times = f"{rate:,.0f} | {median:,.1f} | {min(measured.times_ms):,.1f} .. {max(measured.times_ms):,.1f}"
    memory = " | ".join(f"{size / 2**30:.2f}" for size in (measured.peak_bytes, measured.allocated_bytes))
    return f"{times} | {share} | {memory} | {'' if ours is None else f'{median / ours:.2f}'}"


def step(loss: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer, tokens_bt: Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        result = loss(tokens_bt, tokens_bt.roll(-1, 1))
    result.backward()  # type: ignore[no-untyped-call]  # torch does not type it
    optimizer.step()
    optimizer.zero_grad()


def check(config: ModelConfig, options: argparse.Namespace) -> str:
    """Three steps eagerly, eagerly again and as graphs, from the same weights on the same tokens: are the weights the
    same, whatever the backward computes again? And a step whose every wait for the GPU is an error, and the first loss
    beside that of plain torch."""
    weights, waits = [], "none"
    others: list[tuple[Way, str]] = [("graphs", part) for part in options.recompute if part != "none"]
    runs: list[tuple[Way, str]] = [("eager", "none"), ("eager", "none"), ("graphs", "none"), *others]
    for way, part in runs:
        model = BMojoLM(config).cuda()
        recompute(model, part)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        loss = loss_function(model, way)
        batches = [_tokens(options, seed) for seed in range(3)]
        for tokens_bt in batches:
            step(loss, optimizer, tokens_bt)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(loss, optimizer, torch.zeros(4, 2048, dtype=torch.long, device="cuda"))
        except RuntimeError as error:
            waits = f"{way}: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        del model, optimizer, loss
        _free()
    again, graphs, *parts = (_difference(weights[0], other) for other in weights[1:])
    by_part = "".join(f"; {part} recomputed: {found}" for (_, part), found in zip(others, parts, strict=True))
    return (
        f"eager steps again: {again}; graphs: {graphs}{by_part}; waits for the GPU within a step: {waits}; "
        f"loss: {_loss_beside_plain_torch(config, _tokens(options, seed=0))}"
    )


def _tokens(options: argparse.Namespace, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(options.vocab_size, (4, 2048), device="cuda", generator=generator)


def _difference(one: Tensor, other: Tensor) -> str:
    return "the same bits" if torch.equal(one, other) else f"weights differ by up to {(one - other).abs().max():.1e}"


@torch.no_grad()
def _loss_beside_plain_torch(config: ModelConfig, tokens_bt: Tensor) -> str:
    model, losses = BMojoLM(config).cuda(), []
    for path in (nullcontext(), use("torch")):
        with path, torch.autocast("cuda", torch.bfloat16):
            losses.append(loss_of(model, tokens_bt, tokens_bt.roll(-1, 1)).item())
    return f"{losses[0]:.5f}, of plain torch {losses[1]:.5f}"


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def matmul_peak_flops(size: int = 8192) -> float:
    """The median of ten square bfloat16 matrix products of random numbers."""
    from triton.testing import do_bench

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (1e-3 * float(do_bench(lambda: a @ b, return_mode="median")))


def config_of(options: argparse.Namespace) -> ModelConfig:
    size = SIZES[options.size]
    return ModelConfig(
        pattern=f"bmojo*{size['num_layers']}", vocab_size=options.vocab_size, d_model=size["d_model"],
        d_ff=size["d_ff"], num_heads=size["num_heads"], window_size=512, chunk_size=128, num_eidetic=64, d_state=128,
        ssm_head_dim=64, fading_output=options.fading_output, residual_precision=options.residual_precision,
    )  # fmt: skip


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Sizes, models and what they are to recompute."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--size", choices=SIZES, default="116m", help="number of parameters")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens per sequence")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens per step, of all sequences together")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="bmojo first for ratios")
    parser.add_argument("--vocab-size", type=int, default=32768, help="size of the vocabulary")
    parser.add_argument("--fading-output", choices=("memory", "memory_and_residual"), default="memory")
    parser.add_argument("--residual-precision", choices=("float32", "compute"), default="float32")
    parser.add_argument(
        "--recompute", nargs="+", choices=(NOTHING, *get_args(ActivationCheckpointing)), default=["none"],
        help="activation_checkpointing, each in turn; nothing: not even duplicates; our models only",
    )  # fmt: skip
    return parser


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    options = parser("python -m benchmarks.train_step_gpu", __doc__)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="how they run; ratios: the first")
    options.add_argument("--repeats", type=int, default=10, help="steps of each model that are timed")
    options.add_argument("--check", action="store_true", help="first compare graphs, eager steps and plain torch")
    return options.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
