"""DeepSpeed's trainer on one CPU worker against a bare loop of plain torch: the same model, micro batches and AdamW.

Both take a step in turn, so that what else the machine does meets both alike. The goal is a throughput of at least 0.95
of the bare loop's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from benchmarks.checkpoint_delay import batches_of, config_of
from bmojo import BMojoLM
from data.shards import TokenBatch
from pipelines.stages.train.device import CPU
from pipelines.stages.train.worker import prepare_process


class BareLoop:
    """Accumulation over micro batches by plain torch."""

    def __init__(self, model: BMojoLM, grad_clip: float, weight_decay: float) -> None:
        self._model, self._grad_clip = model, grad_clip
        self._optimizer = torch.optim.AdamW(model.param_groups(weight_decay), lr=1e-4, fused=True)

    def step(self, micro_batches: Sequence[TokenBatch]) -> None:
        for batch in micro_batches:
            loss = self._model(*batch).loss / len(micro_batches)
            loss.backward()
        clip_grad_norm_(self._model.parameters(), self._grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    config = config_of(options)
    prepare_process(config, 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("| ZeRO | bare step, ms | trainer's step, ms | throughput, of the bare loop's | lowest .. highest |")
    print("| --- | --- | --- | --- | --- |")
    batches = batches_of(config, options.seq_len)
    for stage in options.zero_stages:
        settings = config.model_copy(update={"backend": config.backend.model_copy(update={"zero_stage": stage})})
        bare = BareLoop(BMojoLM(config.model), config.grad_clip, config.weight_decay)
        trainer = settings.backend.start(BMojoLM(config.model), settings, CPU)
        pairs = []
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            bare.step(batches)
            middle = time.perf_counter()
            trainer.step(batches, 1e-4)
            pairs.append((middle - start, time.perf_counter() - middle))
        bare_s, ours_s = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
        ratios = [of_bare / ours for of_bare, ours in pairs[1:]]
        print(
            f"| {stage} | {bare_s * 1e3:,.0f} | {ours_s * 1e3:,.0f} | {statistics.median(ratios):.3f} | "
            f"{min(ratios):.3f} .. {max(ratios):.3f} |",
            flush=True,
        )
    dist.destroy_process_group()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer_throughput", description=__doc__)
    parser.add_argument("--model", default="quickstart", help="quickstart, or a preset: bmojo-130m")
    parser.add_argument("--zero-stages", type=int, nargs="+", default=[0, 1], choices=range(4))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10, help="steps of each")
    parser.set_defaults(workers=1, zero_stage=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
