"""What one experiment is: a fault, a place, a stage and a moment, all drawn by its number and the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.faults.places import Where

NEEDS = {  # the stages of pipeline/pipeline.yaml, each after what it reads
    "tokenizer": (),
    "tokens": ("tokenizer",),
    "train": ("tokens",),
    "evaluate": ("train", "tokens"),
    "report": ("train", "evaluate"),
    "export": ("train",),
    "count": ("tokens",),
}
STAGES = tuple(NEEDS)
_LATEST = 0.8  # of moments: stages differ in speed, and a fault that comes too late is injected again sooner
_WHOLE = 0.2  # share of experiments in which the stages after the one that is hit run too


@dataclass(frozen=True)
class Experiment:
    """One fault at one moment. The same seed and number give the same one."""

    seed: int
    number: int
    fault: str
    where: Where
    stage: str
    moment: float  # share of the stage's usual time, after its start
    missing: frozenset[str]  # stages without a result at the start

    @property
    def name(self) -> str:
        """For folders, buckets and marks."""
        return f"{self.seed}-{self.number:03d}"

    def rng(self) -> random.Random:
        """For what the fault leaves to chance."""
        return random.Random(f"{self.seed}/{self.number}/details")


def below(stage: str) -> frozenset[str]:
    """The stage and all that need it."""
    found = {stage}
    for name, needs in NEEDS.items():
        if found & set(needs):
            found.add(name)
    return frozenset(found)


def draw(seed: int, number: int, fault: str, where: Where, stages: tuple[str, ...]) -> Experiment:
    """Choose the stage and the moment."""
    rng = random.Random(f"{seed}/{number}")
    stage = rng.choice(stages)
    missing = below(stage) if rng.random() < _WHOLE else frozenset({stage})
    return Experiment(seed, number, fault, where, stage, round(rng.uniform(0.0, _LATEST), 3), missing)
