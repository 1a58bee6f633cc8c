"""Projections in float8 against bfloat16 on a GPU: one product and its casts, whole training steps, and loss curves.

Steps run as CUDA graphs, as the trainer's do. Curves are of a model that reads the bytes of Python's own library. What
fails is printed, and the rest goes on; parts that would begin after `--seconds` are left out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._peers import has_gpu, loss_of
from benchmarks.train_step_gpu import SIZES, loss_function, step
from bmojo import BMojoLM, ModelConfig
from bmojo.float8 import mark_float8
from kernels.float8_linear import float8_linear
from kernels.float8_linear import triton_path as casts
from kernels.float8_linear.reference import FORWARD, GRADIENT
from kernels.float8_linear.self_check import wrong_on

ROWS = 32768  # tokens per step
PROJECTIONS = {  # inputs and outputs
    "1.4B gate_up": (2048, 7808),
    "1.4B down": (3904, 2048),
    "1.4B q": (2048, 2048),
    "370M gate_up": (1024, 3712),
    "116M gate_up": (768, 2816),
}
STEPS = (("1.4b", 6), ("370m", 12), ("116m", 12))  # sizes and layers
FLOPS = 2e-9  # of a multiply-add, in GFLOP; over milliseconds: TFLOP/s


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.float8_gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=90, help="no part begins after so many")
    parser.add_argument("--curve-steps", type=int, default=200, help="steps of each loss curve")
    options = parser.parse_args(arguments)
    if not has_gpu(cpu_benchmark="train_step"):
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    parts: list[Callable[[], None]] = [
        check,
        *(lambda name=name: products(name) for name in PROJECTIONS),
        lambda: other_scales(*PROJECTIONS["1.4B gate_up"]),
        lambda: steps(*STEPS[0]),
        lambda: curves(options.curve_steps),
        *(lambda size=size, layers=layers: steps(size, layers) for size, layers in STEPS[1:]),
    ]
    started = time.monotonic()
    for part in parts:
        if time.monotonic() - started > options.seconds:
            print("out of time")
            break
        try:
            part()
        except Exception:
            print("FAILED:", *traceback.format_exc().splitlines()[-3:], sep="\n  ")
        gc.collect()
        torch.cuda.empty_cache()
        print(f"[{time.monotonic() - started:.0f} s]", flush=True)
    return 0


def check() -> None:
    """What the trainer checks before it trains in float8."""
    print("wrong:", wrong_on(torch.device("cuda")) or "nothing")


def products(name: str) -> None:
    """Milliseconds of a projection's parts, and how far results are from products in float32."""
    num_in, num_out = PROJECTIONS[name]
    x = torch.randn(ROWS, num_in, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(num_out, num_in, device="cuda")).requires_grad_()
    grad = torch.randn(ROWS, num_out, device="cuda", dtype=torch.bfloat16)
    x8, g8 = casts.cast(x.detach(), FORWARD, transposed=True), casts.cast(grad, GRADIENT, transposed=True)
    w8 = casts.cast(weight.detach().bfloat16(), FORWARD, transposed=True)
    wide, narrow = weight.detach().bfloat16(), x.detach()
    work = FLOPS * ROWS * num_in * num_out
    print(f"\n{name}: {num_in} to {num_out}, {ROWS} rows")
    for label, call in {
        "bf16 y": lambda: narrow @ wide.t(),
        "bf16 gradient of x": lambda: grad @ wide,
        "bf16 gradient of W": lambda: torch.mm(grad.t(), narrow, out_dtype=torch.float32),
        "float8 y, fast sums": lambda: casts.product(x8, w8, torch.bfloat16, True),
        "float8 y, exact sums": lambda: casts.product(x8, w8, torch.bfloat16, False),
        "float8 gradient of x": lambda: casts.product(g8, _turned(w8), torch.bfloat16, False),
        "float8 gradient of x, fast": lambda: casts.product(g8, _turned(w8), torch.bfloat16, True),
        "float8 gradient of W": lambda: casts.product(_turned(g8), _turned(x8), torch.float32, False),
        "float8 gradient of W, fast": lambda: casts.product(_turned(g8), _turned(x8), torch.float32, True),
    }.items():
        ms = median_ms(call)
        print(f"  {label}: {ms:.3f} ms, {work / ms:.0f} TFLOP/s")
    for label, tensor, kind in (("x", narrow, FORWARD), ("gradient", grad, GRADIENT), ("W", wide, FORWARD)):
        ms = median_ms(lambda tensor=tensor, kind=kind: casts.cast(tensor, kind, transposed=True))
        moved = tensor.numel() * (2 * tensor.element_size() + 2) / 1e9
        print(f"  cast of {label}: {ms:.3f} ms, {moved / ms:.2f} TB/s")

    def both(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            y = call(x, weight)
            return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

        return run

    in_bf16, in_float8 = both(lambda x, w: F.linear(x, w.bfloat16())), both(float8_linear)
    print(f"  forward and backward: bf16 {median_ms(in_bf16):.3f} ms, float8 {median_ms(in_float8):.3f} ms")
    few = slice(0, 2048)
    exact = (
        narrow[few].float() @ weight.detach().t(),
        grad[few].float() @ weight.detach(),
        grad.float().t() @ narrow.float(),
    )
    for label, found in (("bf16", in_bf16()), ("float8", in_float8())):
        pairs = zip((found[0][few], found[1][few], found[2]), exact, strict=True)
        print(f"  errors of {label}, y and gradients:", *(f"{_relative(a, b):.2%}" for a, b in pairs))


def other_scales(num_in: int, num_out: int) -> None:
    """Products of y with one scale per row, and per 128 of a row, where this torch has them."""
    a, b = (torch.randn(rows, num_in, device="cuda").to(FORWARD) for rows in (ROWS, num_out))
    work, blocks = FLOPS * ROWS * num_in * num_out, num_in // 128
    scales = {
        "a row": (torch.ones(ROWS, 1, device="cuda"), torch.ones(1, num_out, device="cuda")),
        "128 of a row": (
            torch.ones(blocks, ROWS, device="cuda").t(),
            torch.ones(blocks, num_out, device="cuda"),
        ),
    }
    for label, (scale_a, scale_b) in scales.items():
        try:
            ms = median_ms(
                lambda a_=scale_a, b_=scale_b, fast=label == "a row": torch._scaled_mm(
                    a, b.t(), a_, b_, out_dtype=torch.bfloat16, use_fast_accum=fast
                )
            )
            print(f"  one scale for {label}: {ms:.3f} ms, {work / ms:.0f} TFLOP/s")
        except (RuntimeError, ValueError) as error:
            print(f"  one scale for {label}: {str(error).splitlines()[0][:150]}")


def steps(size: str, num_layers: int) -> None:
    """Milliseconds of training steps of a model with so many of its layers, on random tokens."""
    config = config_of(size, num_layers, vocab_size=50304)
    print(f"\n{size}, {num_layers} layers, {ROWS} tokens per step, 4 sequences")
    for name in ("bf16", "float8"):
        model = model_of(config, name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        loss, times_ms = loss_function(model, "graphs"), []
        torch.cuda.reset_peak_memory_stats()
        for repeat in range(9):
            tokens_bt = torch.randint(50304, (4, ROWS // 4), device="cuda")
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step(loss, optimizer, tokens_bt)
            end.record()
            torch.cuda.synchronize()
            if repeat > 2:
                times_ms.append(start.elapsed_time(end))
        spread = f"{min(times_ms):.1f} .. {max(times_ms):.1f}"
        held = torch.cuda.memory_reserved() / 2**30
        print(f"  {name}: {statistics.median(times_ms):.1f} ms ({spread}), {held:.1f} GiB", flush=True)
        del model, optimizer, loss
        gc.collect()
        torch.cuda.empty_cache()


def curves(num_steps: int) -> None:
    """Training losses of a 116M model, averaged over tenths of the steps, and of the last tenth on other bytes."""
    text = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().cuda()
    train, valid = data[: int(0.95 * len(data))], data[int(0.95 * len(data)) :]
    print(f"\nlosses of 116m, {len(train):,} bytes, 8 x 2,048 per step, lr 1e-3, means of tenths; then of other bytes")
    config = config_of("116m", 12, vocab_size=256)
    for name, seed in (("bf16", 0), ("float8", 0), ("bf16", 1)):
        model = model_of(config, name, seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        loss, found = loss_function(model, "graphs"), []
        generator = torch.Generator().manual_seed(0)
        for number in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (number + 1) / 20, (num_steps - number) / (0.3 * num_steps))
            rows = batch(train, generator)
            with torch.autocast("cuda", torch.bfloat16):
                value = loss(rows, rows.roll(-1, 1))
            value.backward()  # type: ignore[no-untyped-call]  # torch does not type it
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.detach())
        means = torch.stack(found).view(10, -1).mean(1).tolist()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            other = [loss_of(model, rows, rows.roll(-1, 1)) for rows in (batch(valid, generator) for _ in range(4))]
        numbers = " ".join(f"{mean:.4f}" for mean in means)
        print(f"  {name}, seed {seed}: {numbers}; {torch.stack(other).mean():.4f}", flush=True)
        del model, optimizer, loss
        gc.collect()


def batch(data: Tensor, generator: torch.Generator) -> Tensor:
    first = torch.randint(len(data) - 2048, (8,), generator=generator).tolist()
    return torch.stack([data[start : start + 2048] for start in first])


def config_of(size: str, num_layers: int, vocab_size: int) -> ModelConfig:
    fields = {name: value for name, value in SIZES[size].items() if name != "num_layers"}
    return ModelConfig(
        pattern=f"bmojo*{num_layers}", vocab_size=vocab_size, window_size=512, chunk_size=128, num_eidetic=64,
        d_state=128, fading_output="memory_and_residual", **fields,
    )  # fmt: skip


def model_of(config: ModelConfig, name: str, seed: int = 0) -> BMojoLM:
    with torch.device("cuda"):
        model = BMojoLM(config)
    model.init_weights(seed)
    if name == "float8":
        mark_float8(model)
    return model


def median_ms(call: Callable[[], object]) -> float:
    """Of ten calls, between CUDA events."""
    times = []
    for repeat in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        if repeat > 2:
            times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def _turned(made: casts.Float8) -> casts.Float8:
    assert made.columns is not None
    return casts.Float8(made.columns, None, made.inverse)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


if __name__ == "__main__":
    sys.exit(main())
