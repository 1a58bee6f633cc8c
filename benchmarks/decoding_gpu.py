"""Decoding on a GPU in bfloat16, one CUDA graph per token, at growing batches and contexts, against Llama.

Llama has as many parameters. It is transformers', with SDPA and a cache of fixed size that is updated in place,
captured as a CUDA graph as well. A long context is made, not read: positions are set, and rings, caches and states hold
random numbers. What is computed and moved depends on neither. Llama's cache is full: it has room for the context only.
Medians of single tokens.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._peers import build, has_gpu, num_params
from benchmarks.train_step_gpu import SIZES
from bmojo import BMojoLM, ModelConfig, to_bfloat16
from bmojo.decoding import Decoder, capture
from bmojo.mixers import MIXERS
from bmojo.state import DecodingState

MODELS = (*dict.fromkeys(("bmojo", *MIXERS)), "llama")
HEADER = """\
| model | batch | context | ms/token | lowest .. highest | tokens/s | kernels/token | state or cache per row, MB |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of each timed token, launches of a token and bytes that a row keeps; no times: it failed."""

    times_ms: list[float]
    num_kernels: int = 0
    num_bytes: int = 0
    failure: str = ""


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if not has_gpu(cpu_benchmark="decoding"):
        return 2
    config = config_of(options)
    with torch.device("meta"):
        target = num_params(BMojoLM(config))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, about {target:,} parameters\n\n{HEADER}")
    for name in options.models:
        model = to_bfloat16(BMojoLM(config) if name == "bmojo" else build(name, config, target)).cuda().eval()
        for batch_size in options.batch:
            for position in options.positions:
                measured = measure(model, batch_size, position, options.tokens)
                print(row_of(name, batch_size, position, measured), flush=True)
        del model
    return 0


@torch.no_grad()
def measure(model: nn.Module, batch_size: int, position: int, num_tokens: int) -> Measurement:
    """Time tokens one by one, after some that warm up and are recorded."""
    try:
        read, num_bytes = reader(model, batch_size, position, num_tokens + 8)
        for _ in range(4):
            read()
        num_kernels = launches(read)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_tokens)]
        for start, end in events:
            start.record()
            read()
            end.record()
        torch.cuda.synchronize()
        return Measurement([start.elapsed_time(end) for start, end in events], num_kernels, num_bytes // batch_size)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return Measurement([], failure=str(error).splitlines()[0][:60])
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def reader(model: nn.Module, batch_size: int, position: int, num_tokens: int) -> tuple[Callable[[], Tensor], int]:
    """What reads one more token per row, on a context of `position` tokens; and the bytes that it keeps of all rows."""
    device = next(model.parameters()).device
    tokens_b = torch.zeros(batch_size, dtype=torch.long, device=device)
    if not isinstance(model, BMojoLM):
        read, cache = llama_reader(model, tokens_b, position)
        return (capture(read) if device.type == "cuda" else read), cache.num_bytes()
    state = made_state(model, batch_size, position, num_tokens)
    decoder = Decoder(model, state)
    return lambda: decoder.step(tokens_b), state.num_bytes()


@torch.no_grad()
def made_state(model: BMojoLM, batch_size: int, position: int, num_tokens: int) -> DecodingState:
    """A state as after `position` tokens, of random numbers, with room for `num_tokens` more."""
    state = model.init_state(batch_size, max_tokens=position + num_tokens)
    for path, x in state.tensors().items():
        if path == "position_b":
            x.fill_(position)
        elif path.endswith("slots.position"):
            x.copy_(torch.arange(x.shape[1], device=x.device))
        elif path.endswith("slots.log_e"):
            x.copy_(torch.linspace(9, 8, x.shape[1], device=x.device))  # best first; new tokens seldom enter
        else:
            x.normal_(std=0.5)
    return state


class FixedCache:
    """What transformers' Llama asks of a cache: room of one size, written in place where `position` says."""

    is_compileable = True
    is_sliding = (False,)

    def __init__(self, llama: Any, batch_size: int, room: int, device: torch.device) -> None:
        heads, head_dim = llama.config.num_key_value_heads, llama.config.hidden_size // llama.config.num_attention_heads
        shape = (2, batch_size, heads, room, head_dim)
        layers = range(llama.config.num_hidden_layers)
        self.rows = [torch.empty(shape, dtype=llama.dtype, device=device).normal_(std=0.5) for _ in layers]
        self.position = torch.tensor([room - 1], device=device)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a token's keys and values; return those of all."""
        rows = self.rows[layer_idx]
        rows[0].index_copy_(2, self.position, k)
        rows[1].index_copy_(2, self.position, v)
        return rows[0], rows[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the one at hand."""
        return self.rows[layer_idx].shape[3] - 1

    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.rows)


def llama_reader(llama: Any, tokens_b: Tensor, position: int) -> tuple[Callable[[], Tensor], FixedCache]:
    """A forward of one token per row over a cache of `position` rows, its own included; run once, to warm up."""
    cache = FixedCache(llama, tokens_b.shape[0], position, tokens_b.device)
    mask = torch.ones(tokens_b.shape[0], 1, 1, position, dtype=torch.bool, device=tokens_b.device)
    inputs = {"input_ids": tokens_b[:, None], "attention_mask": mask, "position_ids": cache.position[None]}

    def read() -> Tensor:
        logits: Tensor = llama(**inputs, past_key_values=cache, cache_position=cache.position, use_cache=True).logits
        return logits[:, -1]

    read()
    return read, cache


def launches(read: Callable[[], Tensor]) -> int:
    """Kernels and copies that a token takes on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        read()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def row_of(name: str, batch_size: int, position: int, measured: Measurement) -> str:
    if not measured.times_ms:
        return f"| {name} | {batch_size} | {position:,} | {measured.failure} |  |  |  |  |"
    median = statistics.median(measured.times_ms)
    times = f"{median:.3f} | {min(measured.times_ms):.3f} .. {max(measured.times_ms):.3f}"
    counts = f"{batch_size / median * 1e3:,.0f} | {measured.num_kernels} | {measured.num_bytes / 1e6:,.1f}"
    return f"| {name} | {batch_size} | {position:,} | {times} | {counts} |"


def config_of(options: argparse.Namespace) -> ModelConfig:
    size = SIZES[options.size]
    return ModelConfig(
        pattern=f"bmojo*{size['num_layers']}", vocab_size=options.vocab_size, d_model=size["d_model"],
        d_ff=size["d_ff"], num_heads=size["num_heads"], window_size=512, chunk_size=128, num_eidetic=64, d_state=128,
        ssm_head_dim=64, fading_output="memory_and_residual",
    )  # fmt: skip


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding_gpu", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="116m", help="number of parameters")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["bmojo", "attention", "llama"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="rows that are decoded side by side")
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 32768, 1048576], help="tokens of context")
    parser.add_argument("--tokens", type=int, default=50, help="tokens that are timed")
    parser.add_argument("--vocab-size", type=int, default=32768, help="size of the vocabulary")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
