"""Training step on CPU: forward + backward + AdamW in float32, B'MOJO against peers of equal parameters.

The optimizer is the fused one that our trainer uses. Models are stepped in turn within one process and compared repeat
by repeat, so that what else the machine does meets all of them alike; the table shows medians, and of the ratios also
the spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks._peers import PEERS, PLAIN, base_config, build, loss_of, num_params
from bmojo import BMojoLM
from bmojo.allocator import keep_freed_memory
from bmojo.counting import count
from bmojo.mixers import MIXERS
from kernels.operator import use


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    if options.keep_freed_memory:
        keep_freed_memory()
    config = base_config(options.num_layers, options.vocab_size)
    subject = BMojoLM(config)
    target = num_params(subject)
    peak = matmul_peak_flops()
    print(f"torch {torch.__version__}, {options.threads} threads, float32 matmul peak {peak / 1e9:.0f} GFLOP/s")
    print(f"bmojo: {target:,} parameters, {config.num_layers} layers\n")
    print("| model | parameters | seq_len | tokens/s | step, ms | bmojo is x times as fast | lowest .. highest |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for seq_len in options.seq_len:
        models = {"bmojo": subject} | {name: build(name, config, target) for name in options.peers}
        times_s = time_steps(models, seq_len, options.vocab_size, options.repeats)
        for name, model in models.items():
            median = statistics.median(times_s[name])
            ratios = [peer / ours for peer, ours in zip(times_s[name], times_s["bmojo"], strict=True)]
            print(
                f"| {name} | {num_params(model):,} | {seq_len} | {seq_len / median:,.0f} | {median * 1e3:,.0f} | "
                f"{statistics.median(ratios):.2f} | {min(ratios):.2f} .. {max(ratios):.2f} |",
                flush=True,
            )
        flops = count(config, seq_len).train_flops_per_token * seq_len / statistics.median(times_s["bmojo"])
        print(f"\nbmojo at {seq_len}: {flops / 1e9:.0f} GFLOP/s, {flops / peak:.0%} of the matmul peak\n")
    if options.profile:
        print(profile_step(subject, options.seq_len[0], options.vocab_size))


def time_steps(models: dict[str, nn.Module], seq_len: int, vocab_size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, models in turn, after one step each to warm up."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, model in models.items()}
    times_s: dict[str, list[float]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(0)
    for repeat in range(repeats + 1):
        tokens_bt = torch.randint(vocab_size, (1, seq_len), generator=generator)
        for name, model in models.items():
            with use("torch") if name == PLAIN else nullcontext():
                start = time.perf_counter()
                step(model, optimizers[name], tokens_bt)
                if repeat:
                    times_s[name].append(time.perf_counter() - start)
    return times_s


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens_bt: Tensor) -> None:
    loss_of(model, tokens_bt, tokens_bt.roll(-1, 1)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def matmul_peak_flops(size: int = 2048) -> float:
    """The best of ten square float32 matrix products."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best_s = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s


def profile_step(model: nn.Module, seq_len: int, vocab_size: int) -> str:
    """Where a step's time goes, by operator."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens_bt = torch.randint(vocab_size, (1, seq_len))
    step(model, optimizer, tokens_bt)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(model, optimizer, tokens_bt)
    table: str = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024], help="tokens per step (batch of one)")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=[*MIXERS, *PEERS, PLAIN],
        default=["llama"],
        help=f"models to compare; {PLAIN}: without C++ kernels",
    )
    parser.add_argument("--repeats", type=int, default=7, help="steps of each model that are timed")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--num-layers", type=int, default=7, help="layers of every model but mamba2_hf")
    parser.add_argument("--vocab-size", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="for all models alike, as our trainer does on CPU"
    )
    parser.add_argument("--profile", action="store_true", help="print where bmojo's time goes at the first seq_len")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
