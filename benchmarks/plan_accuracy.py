"""Plans against measurements on this CPU: resident memory of a worker, time of a step, and that plans repeat.

Each case is measured twice by processes like training workers (pipelines/stages/train/planning/probe.py). The first
measurement is what `bmojo plan --measure` keeps and says; the second is what it is compared with. Memory is planned
without either. Goals: memory within 10 %, time within 25 %, ten plans equal. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

from bmojo.fields import ActivationCheckpointing
from pipelines.engine.provenance import machine
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.planning.activations import activations
from pipelines.stages.train.planning.calibration import core_peak, process_memory
from pipelines.stages.train.planning.memory import MemoryPlan, plan_memory
from pipelines.stages.train.planning.probe import measure
from pipelines.stages.train.planning.speed import SpeedPlan, plan_speed, remember

MEMORY_GOAL, TIME_GOAL = 0.10, 0.25
SEQ_LEN = 512
_SMALL = {"d_model": 192, "num_heads": 3, "ssm_head_dim": 64, "window_size": 128, "chunk_size": 64, "num_eidetic": 32}
_WIDE = {**_SMALL, "d_model": 512, "num_heads": 8}
_MIB = 1 << 20


class Case(NamedTuple):
    """One training; of each step the worker takes `accumulation` micro batches."""

    pattern: str = "bmojo*4"
    micro_batch: int = 4
    zero_stage: int = 1
    num_workers: int = 1
    checkpointing: ActivationCheckpointing = "none"
    accumulation: int = 1
    is_wide: bool = False  # where weights and moments matter more than activations

    @property
    def train(self) -> TrainStageConfig:
        """Its settings."""
        size: dict[str, Any] = {**_WIDE, "vocab_size": 16384} if self.is_wide else {**_SMALL, "vocab_size": 4096}
        return TrainStageConfig.model_validate(
            {
                "kind": "train",
                "model": size | {"pattern": self.pattern},
                "global_batch_size": self.micro_batch * self.num_workers * self.accumulation,
                "micro_batch_size": self.micro_batch,
                "max_steps": 100,
                "warmup_steps": 10,
                "backend": {"kind": "deepspeed", "zero_stage": self.zero_stage},
                "activation_checkpointing": self.checkpointing,
                "resources": {"num_workers": self.num_workers},
            }
        )


CASES = (
    Case(),
    Case(micro_batch=1),
    Case(micro_batch=16),
    Case("mamba2*4"),
    Case("attention*4"),
    Case(checkpointing="attention"),
    Case(checkpointing="block", micro_batch=16),
    *(Case("attention*4", 2, stage, workers, is_wide=True) for workers in (1, 2) for stage in (0, 1, 2, 3)),
    Case("bmojo*4", 2, 2, 2, accumulation=2, is_wide=True),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy", description=__doc__)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="numbers, from 0")
    options = parser.parse_args(arguments)
    print(f"{machine()['cpu']}\n")
    for part in dict.fromkeys(CASES[number].checkpointing for number in options.cases):
        process = process_memory(part)
        print(f"Recomputed: {part}. Process {process.base_bytes / _MIB:.0f} MiB, ", end="")
        print(f"{process.per_activation_byte:.2f} bytes per byte of activations.\n")
    print(
        "| model | micro batch | ZeRO | workers | recomputed | memory, MiB | planned | off | step, s | planned | off |"
    )
    print("|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|")
    worst_memory = worst_time = 0.0
    equal = True
    for number in options.cases:
        case = CASES[number]
        train = case.train
        remember(train, SEQ_LEN, measure(train, SEQ_LEN), "plan --measure")
        measured = measure(train, SEQ_LEN)
        plans = [_plan(train) for _ in range(10)]
        equal &= all(plan == plans[0] for plan in plans)
        memory, speed = plans[0]
        off_memory = memory.peak / measured.peak_bytes - 1
        off_time = speed.step_s / measured.step_s - 1
        worst_memory, worst_time = max(worst_memory, abs(off_memory)), max(worst_time, abs(off_time))
        name = f"{case.pattern}{', wide' if case.is_wide else ''}"
        micro = f"{case.micro_batch}{f' x {case.accumulation}' if case.accumulation > 1 else ''}"
        print(
            f"| {name} | {micro} | {case.zero_stage} | {case.num_workers} | {case.checkpointing} | "
            f"{measured.peak_bytes / _MIB:,.0f} | {memory.peak / _MIB:,.0f} | {off_memory:+.1%} | "
            f"{measured.step_s:.3f} | {speed.step_s:.3f} | {off_time:+.1%} |",
            flush=True,
        )
    print(f"\nMemory: off by {worst_memory:.1%} at most (goal {MEMORY_GOAL:.0%}). ", end="")
    print(f"Time: {worst_time:.1%} (goal {TIME_GOAL:.0%}). Ten plans each: {'equal' if equal else 'NOT equal'}.")
    return 0 if worst_memory <= MEMORY_GOAL and worst_time <= TIME_GOAL and equal else 1


def _plan(train: TrainStageConfig) -> tuple[MemoryPlan, SpeedPlan]:
    """As `bmojo plan` makes it, from nothing but what is kept."""
    activations.cache_clear()
    memory = plan_memory(train, SEQ_LEN, process_memory(train.activation_checkpointing))
    speed = plan_speed(train, SEQ_LEN, None, core_peak(), 2.0)
    return memory, SpeedPlan(speed.step_s, speed.source.partition(",")[0], speed.is_measured)  # without its age


if __name__ == "__main__":
    sys.exit(main())
