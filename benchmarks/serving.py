"""Serving on CPU: tokens per second of 1 to 16 clients, batches of 1 and 16 rows, and what a long prompt holds up.

Each client asks for one answer after the other, over HTTP, of a server in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx

PROMPT = "def function(x):\n    return x + 1\n" * 2


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.serve:
        _serve(options)
        return
    print("| rows | clients | tokens/s | ms between tokens | ms to the first | same tokens as alone |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num_rows in options.rows:
        process, url = _started(options, num_rows)
        try:
            asyncio.run(_measure_clients(url, num_rows, options))
            if num_rows == max(options.rows):
                asyncio.run(_measure_long_prompt(url, options))
        finally:
            process.terminate()
            process.wait()


class Answer(NamedTuple):
    """Of one request: ids, and when each came, from the moment of the request."""

    tokens: list[int]
    times_s: list[float]


async def _ask(client: httpx.AsyncClient, url: str, prompt: str, max_tokens: int, seed: int) -> Answer:
    body: dict[str, Any] = {
        "prompt": prompt, "max_tokens": max_tokens, "seed": seed, "ignore_eos": True, "return_token_ids": True,
        "stream": True,
    }  # fmt: skip
    answer, begun = Answer([], []), time.perf_counter()
    async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=None) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                new = json.loads(line[6:])["choices"][0]["token_ids"]
                answer.tokens.extend(new)
                answer.times_s.extend([time.perf_counter() - begun] * len(new))
    return answer


async def _measure_clients(url: str, num_rows: int, options: argparse.Namespace) -> None:
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
        await _ask(client, url, PROMPT, 8, 0)
        alone = [await _ask(client, url, PROMPT[seed:], options.tokens, seed) for seed in range(max(options.clients))]
        for num_clients in options.clients:
            begun = time.perf_counter()
            answers = await asyncio.gather(
                *(_ask(client, url, PROMPT[seed:], options.tokens, seed) for seed in range(num_clients))
            )
            wall_s = time.perf_counter() - begun
            gaps = [b - a for one in answers for a, b in pairwise(one.times_s)]
            same = all(one.tokens == other.tokens for one, other in zip(answers, alone, strict=False))
            rate = sum(len(one.tokens) for one in answers) / wall_s
            first_s = statistics.median(one.times_s[0] for one in answers)
            print(
                f"| {num_rows} | {num_clients} | {rate:.1f} | {statistics.median(gaps) * 1e3:.1f} | "
                f"{first_s * 1e3:.0f} | {'yes' if same else 'NO'} |",
                flush=True,
            )


async def _measure_long_prompt(url: str, options: argparse.Namespace) -> None:
    async with httpx.AsyncClient() as client:
        talking = asyncio.create_task(_ask(client, url, PROMPT, 3 * options.tokens, 0))
        await asyncio.sleep(1)
        begun = time.perf_counter()
        await _ask(client, url, PROMPT * (options.prompt // len(PROMPT)), 1, 1)
        read_s = time.perf_counter() - begun
        times = (await talking).times_s
    gaps = sorted((b - a for a, b in pairwise(times)), reverse=True)
    print(
        f"\nA prompt of {options.prompt:,} tokens was read in {read_s:.1f} s. An answer beside it waited for a token "
        f"{gaps[0] * 1e3:.0f} ms at most; its median is {statistics.median(gaps) * 1e3:.1f} ms."
    )


def _started(options: argparse.Namespace, num_rows: int) -> tuple[subprocess.Popen[str], str]:
    same = [f"--num-layers={options.num_layers}", f"--vocab-size={options.vocab_size}", f"--threads={options.threads}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", "--serve", f"--rows={num_rows}", *same],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def _serve(options: argparse.Namespace) -> None:
    """Print the URL once the server listens."""
    import torch

    from benchmarks._peers import base_config, num_params
    from bmojo import BMojoLM
    from data.tokenizer import byte_tokenizer
    from pipelines.serving.app import make_app
    from pipelines.serving.engine import Engine, Limits
    from pipelines.serving.metrics import Metrics
    from pipelines.serving.server import bound_socket, serve, url_of
    from pipelines.serving.service import Service
    from pipelines.serving.states import StateStore

    torch.set_num_threads(options.threads)
    model, tokenizer, metrics = (
        BMojoLM(base_config(options.num_layers, options.vocab_size)).eval(),
        byte_tokenizer(),
        Metrics(),
    )
    print(f"torch {torch.__version__}, {options.threads} threads, {num_params(model):,} parameters", file=sys.stderr)
    engine = Engine(model, tokenizer, Limits(options.rows[0]), metrics)
    with tempfile.TemporaryDirectory() as folder, bound_socket("127.0.0.1", 0) as bound:
        store = StateStore(Path(folder), "model", "0" * 64, model.init_state(1))
        service = Service("model", engine, tokenizer, store, metrics, max_tokens=1 << 20)
        serve(make_app(service, "127.0.0.1", None), bound, 1, lambda: print(url_of(bound), flush=True))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="rows of the batch, one server for each")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
