"""Training step on a GPU: forward + backward + AdamW under bfloat16 autocast, B'MOJO against models of equal size.

All models but llama, which is transformers' with SDPA, are ours, and differ in their layers' mixers. Steps of a model
are timed one after the other, between synchronisations; the table shows medians.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks._peers import PLAIN, build, loss_of, num_params
from bmojo import BMojoLM, ModelConfig
from bmojo.counting import count
from bmojo.mixers import MIXERS
from kernels.operator import use

MODELS = (*dict.fromkeys(("bmojo", *MIXERS)), PLAIN, "llama")
HEADER = """\
| model | parameters | seq_len | tokens/s | step, ms | lowest .. highest | peak memory, GiB | bmojo is x times as fast |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Measurement:
    """Seconds of each timed step, and the most memory that was allocated meanwhile; no steps: out of memory."""

    times_s: list[float]
    peak_bytes: int


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if not torch.cuda.is_available():
        print("error: there is no GPU here (torch.cuda.is_available() is false).\n"
              "  On a CPU: python -m benchmarks.train_step", file=sys.stderr)  # fmt: skip
        return 2
    config = config_of(options)
    with torch.device("meta"):
        target = num_params(BMojoLM(config))
    peak = matmul_peak_flops()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16 matmul peak {peak / 1e12:.0f} TFLOP/s")
    print(f"{options.tokens} tokens per step; {config.num_layers} layers, d_model {config.d_model}\n\n{HEADER}")
    for seq_len in options.seq_len:
        ours: float | None = None
        for name in options.models:
            model = BMojoLM(config) if name == "bmojo" else build(name, config, target)
            measured = measure(model.cuda(), name, seq_len, options)
            row, ours = row_of(name, num_params(model), seq_len, measured, options.tokens, ours)
            print(row, flush=True)
            del model
        if ours is not None:
            flops = count(config, seq_len).train_flops_per_token * options.tokens / ours
            print(f"\nbmojo at {seq_len}: {flops / 1e12:.0f} TFLOP/s, {flops / peak:.0%} of the matmul peak\n")
    return 0


def measure(model: nn.Module, name: str, seq_len: int, options: argparse.Namespace) -> Measurement:
    """Time steps of one model after two to warm up; memory is freed afterwards."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape, times_s = (options.tokens // seq_len, seq_len), []
    try:
        with use("torch") if name == PLAIN else nullcontext():
            for repeat in range(options.repeats + 2):
                tokens_bt = torch.randint(options.vocab_size, shape, device="cuda")
                torch.cuda.synchronize()
                start = time.perf_counter()
                step(model, optimizer, tokens_bt)
                torch.cuda.synchronize()
                if repeat > 1:
                    times_s.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        times_s = []
    return Measurement(times_s, torch.cuda.max_memory_allocated())


def row_of(
    name: str, parameters: int, seq_len: int, measured: Measurement, tokens: int, ours: float | None
) -> tuple[str, float | None]:
    """A row of the table, and bmojo's median in seconds as soon as it is known."""
    if not measured.times_s:
        return f"| {name} | {parameters:,} | {seq_len} | out of memory |  |  |  |  |", ours
    median = statistics.median(measured.times_s)
    ours = median if name == "bmojo" else ours
    low, high = (1e3 * pick(measured.times_s) for pick in (min, max))
    ratio = f"{median / ours:.2f}" if ours else ""
    times = f"{tokens / median:,.0f} | {median * 1e3:,.1f} | {low:,.1f} .. {high:,.1f}"
    return f"| {name} | {parameters:,} | {seq_len} | {times} | {measured.peak_bytes / 2**30:.1f} | {ratio} |", ours


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens_bt: Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(model, tokens_bt, tokens_bt.roll(-1, 1))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def matmul_peak_flops(size: int = 8192) -> float:
    """The median of ten square bfloat16 matrix products of random numbers."""
    from triton.testing import do_bench

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (1e-3 * float(do_bench(lambda: a @ b, return_mode="median")))


def config_of(options: argparse.Namespace) -> ModelConfig:
    d = options.d_model
    return ModelConfig(
        pattern=f"bmojo*{options.num_layers}", vocab_size=options.vocab_size, d_model=d, num_heads=d // 64,
        window_size=512, chunk_size=256, num_eidetic=128, d_state=128, ssm_head_dim=64,
    )  # fmt: skip


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step_gpu", description=__doc__)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens per sequence")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens per step, of all sequences together")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="bmojo first for ratios")
    parser.add_argument("--repeats", type=int, default=10, help="steps of each model that are timed")
    parser.add_argument("--num-layers", type=int, default=12, help="layers of every model")
    parser.add_argument("--d-model", type=int, default=1024, help="width of every model; heads have 64 channels")
    parser.add_argument("--vocab-size", type=int, default=32768, help="size of the vocabulary")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
