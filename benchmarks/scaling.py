"""Cost by length on CPU: time and memory per token of a training step, and resident memory of a long prefill.

Every measurement runs in a process of its own, because resident memory only ever grows within one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time

import psutil
import torch

from benchmarks._peers import base_config
from bmojo import BMojoLM
from bmojo.allocator import keep_freed_memory


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.measure:
        print(json.dumps(_train(options) if options.measure == "train" else _prefill(options)))
        return
    print("| seq_len | training step, us/token | memory, bytes/token |")
    print("| --- | --- | --- |")
    times_s: dict[int, list[float]] = {n: [] for n in options.seq_len}
    num_bytes: dict[int, float] = {}
    for _ in range(options.repeats):
        for seq_len in options.seq_len:
            result = _measure("train", seq_len, options)
            times_s[seq_len].append(result["time_s"] / seq_len)
            num_bytes[seq_len] = result["num_bytes"] / seq_len
    for seq_len in options.seq_len:
        print(f"| {seq_len} | {statistics.median(times_s[seq_len]) * 1e6:.1f} | {num_bytes[seq_len]:,.0f} |")
    first, last = options.seq_len[0], options.seq_len[-1]
    slower = statistics.median(b / a for a, b in zip(times_s[first], times_s[last], strict=True))
    print(f"\n{last} against {first}: {slower:.3f} times the time a token, ", end="")
    print(f"{num_bytes[last] / num_bytes[first]:.3f} times the memory a token.")
    result = _measure("prefill", options.prefill, options)
    resident_gib = result["num_bytes"] / 2**30
    print(f"Prefill of {options.prefill} tokens: {result['time_s']:.1f} s, {resident_gib:.2f} GiB resident.")


def _measure(kind: str, seq_len: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--measure", kind, "--seq-len", str(seq_len)]
    command += ["--threads", str(options.threads), "--num-layers", str(options.num_layers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _train(options: argparse.Namespace) -> dict[str, float]:
    (seq_len,) = options.seq_len
    model = BMojoLM(base_config(options.num_layers, options.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens_bt = torch.randint(options.vocab_size, (1, seq_len))

    def step(tokens_bt: torch.Tensor) -> None:
        model(tokens_bt, tokens_bt.roll(-1, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(tokens_bt[:, :1024])  # optimizer state and thread pools are no cost of length
    ctypes.CDLL(None).malloc_trim(0)  # nor is memory that this step has freed
    before = psutil.Process().memory_info().rss
    step(tokens_bt)
    start = time.perf_counter()
    step(tokens_bt)
    return {"time_s": time.perf_counter() - start, "num_bytes": _peak_bytes() - before}


def _prefill(options: argparse.Namespace) -> dict[str, float]:
    (seq_len,) = options.seq_len
    model = BMojoLM(base_config(options.num_layers, options.vocab_size)).eval()
    start = time.perf_counter()
    model.prefill(torch.randint(options.vocab_size, (1, seq_len)))
    return {"time_s": time.perf_counter() - start, "num_bytes": _peak_bytes()}


def _peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4096, 32768], help="tokens per step (batch of one)")
    parser.add_argument("--prefill", type=int, default=65536, help="tokens to prefill")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each length")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--num-layers", type=int, default=7, help="layers of the model")
    parser.add_argument("--vocab-size", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--measure", choices=["train", "prefill"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
