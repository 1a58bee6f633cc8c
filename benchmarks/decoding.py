"""Decoding on CPU: time and state bytes per token at growing positions, against Llama with its KV cache."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks._peers import base_config, build, num_params
from bmojo import BMojoLM
from bmojo.decoding import Decoder


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    config = base_config(options.num_layers, options.vocab_size)
    model = BMojoLM(config).eval()
    llama = build("llama", config, num_params(model)).eval() if options.llama else None
    print(f"torch {torch.__version__}, {options.threads} threads, {num_params(model):,} parameters\n")
    print("| position | bmojo ms/token | bmojo state bytes | llama ms/token | llama cache bytes | tokens/s ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    states = {position: _at(model, position, options.vocab_size) for position in options.positions}
    decoders = {position: Decoder(model, state) for position, state in states.items()}
    caches = {p: _llama_at(llama, p, options.vocab_size) if llama is not None else None for p in options.positions}
    ours: dict[int, list[float]] = {position: [] for position in options.positions}
    theirs: dict[int, list[float]] = {position: [] for position in options.positions}
    with torch.no_grad():
        for repeat in range(options.repeats + 1):
            for position in options.positions:
                token_b = torch.randint(options.vocab_size, (1,))
                start = time.perf_counter()
                for _ in range(options.tokens):
                    decoders[position].step(token_b)
                if repeat:
                    ours[position].append((time.perf_counter() - start) / options.tokens)
                if llama is not None:
                    start = time.perf_counter()
                    for _ in range(options.tokens):
                        llama(input_ids=token_b[None], past_key_values=caches[position], use_cache=True)
                    if repeat:
                        theirs[position].append((time.perf_counter() - start) / options.tokens)
    for position in options.positions:
        our_s, num_bytes = statistics.median(ours[position]), states[position].num_bytes()
        row = f"| {position} | {our_s * 1e3:.2f} | {num_bytes:,} |"
        if llama is not None:
            ratio = statistics.median(b / a for a, b in zip(ours[position], theirs[position], strict=True))
            their_s = statistics.median(theirs[position])
            row += f" {their_s * 1e3:.2f} | {_cache_bytes(caches[position]):,} | {ratio:.2f} |"
        print(row)
    first, last = options.positions[0], options.positions[-1]
    growth = statistics.median(b / a for a, b in zip(ours[first], ours[last], strict=True))
    print(f"\nbmojo at {last} against {first}: {growth:.3f} times the time per token.")


@torch.no_grad()
def _at(model: BMojoLM, position: int, vocab_size: int) -> Any:
    tokens_bt = torch.randint(vocab_size, (1, position), generator=torch.Generator().manual_seed(0))
    return model.prefill(tokens_bt)[1]


@torch.no_grad()
def _llama_at(llama: Any, position: int, vocab_size: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    tokens_bt = torch.randint(vocab_size, (1, position), generator=torch.Generator().manual_seed(0))
    for part in tokens_bt.split(1024, 1):
        llama(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _cache_bytes(cache: Any) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 8192, 32768], help="where to measure")
    parser.add_argument("--tokens", type=int, default=16, help="tokens in one measurement")
    parser.add_argument("--repeats", type=int, default=9, help="measurements at each position")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--num-layers", type=int, default=7, help="layers of both models")
    parser.add_argument("--vocab-size", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--no-llama", dest="llama", action="store_false", help="leave the comparison out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
