"""The pipelines of the claims, and how they are made smaller or put on a GPU: by overrides of `bmojo run` alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "configs" / "reproduce"
RECIPES = ("selection", "recall", "memory", "drift", "mad", "text")
"""In the order in which they are run."""

QUICK_SEEDS = 2
_QUICK_VALUES = 2
_GPU_SHARE = 0.125  # eight trainings at a time: each is too small to fill the GPU
_GPU_STEPS = 4  # times as many as on a CPU
_GPU_TEXT = {
    "tokenizer.vocab_size": 8192,
    "tokens.seq_len": 1024,
    "train.model.d_model": 384,
    "train.model.num_heads": 6,
    "train.model.window_size": 256,
    "train.model.chunk_size": 128,
    "train.model.num_eidetic": 128,
    "train.model.d_ff": 1024,
    "train.foreach.model.attention.d_ff": 1456,
    "train.foreach.model.mamba2.d_ff": 1152,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 8,
    "train.lr": 1.0e-3,
}


class Scale(StrEnum):
    """Size of the whole."""

    CPU = "cpu"  # as the recipes stand: hours on 2 cores
    GPU = "gpu"  # longer trainings and larger models of text: minutes on one GPU
    QUICK = "quick"  # two values of everything, two steps: shows that it runs, and nothing else


@dataclass(frozen=True)
class Setting:
    """What the command was asked for. Attributes: corpus: text files in place of the standard library."""

    scale: Scale
    storage: str
    corpus: tuple[str, ...] = ()
    num_cpus: int | None = None

    def overrides(self, recipe: str, num_seeds: int | None = None) -> list[str]:
        """For `bmojo run configs/reproduce/RECIPE.yaml`. Args: num_seeds: of the first seeds only; None: of all."""
        raw = yaml.safe_load(recipe_file(recipe).read_text(encoding="utf-8"))
        stages: Mapping[str, Any] = raw["stages"]
        changes: dict[str, Any] = {"storage": self.storage}
        if self.num_cpus is not None:
            changes["cluster.num_cpus"] = self.num_cpus
        if self.corpus and "tokenizer" in stages:
            source = {"kind": "files", "paths": list(self.corpus)}
            changes |= {"tokenizer.source": source, "tokens.source": source}
        if self.scale is Scale.QUICK:
            changes |= dict(_quick(stages))
        elif self.scale is Scale.GPU:
            changes |= dict(_on_gpu(stages))
            changes |= _GPU_TEXT if recipe == "text" else {}
        if num_seeds is not None:
            changes["train.foreach.seed"] = stages["train"]["foreach"]["seed"][:num_seeds]
        return [f"{path}={json.dumps(value)}" for path, value in changes.items()]


def num_seeds(recipe: str) -> int:
    """Seeds of each training of a recipe."""
    raw = yaml.safe_load(recipe_file(recipe).read_text(encoding="utf-8"))
    return len(raw["stages"]["train"]["foreach"]["seed"])


def recipe_file(recipe: str) -> Path:
    """Its pipeline file."""
    return FOLDER / f"{recipe}.yaml"


def _quick(stages: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, stage in stages.items():
        for field, values in stage.get("foreach", {}).items():
            most = QUICK_SEEDS if field == "seed" else _QUICK_VALUES
            if len(values) > most and not _is_mixed(stages, name):
                yield f"{name}.foreach.{field}", _first(values, most)
        if stage["kind"] == "train":
            yield f"{name}.max_steps", 2
            yield f"{name}.warmup_steps", 1
            yield f"{name}.validation_batches", 1
        if stage.get("source", {}).get("kind") == "synthetic":
            yield f"{name}.source.num_documents", 400
        for number, measure in enumerate(stage.get("measures", ())):
            if measure["kind"] == "recall":
                yield f"{name}.measures.{number}.num_examples", 10
            if measure["kind"] == "text":
                yield f"{name}.measures.{number}.max_tokens", 2000
            if measure["kind"] == "position":
                yield f"{name}.measures.{number}.max_windows", 2


def _on_gpu(stages: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, stage in stages.items():
        if stage["kind"] == "train":
            yield f"{name}.max_steps", _GPU_STEPS * stage["max_steps"]
        if stage["kind"] in ("train", "evaluate"):
            yield f"{name}.resources", {"num_workers": 1, "cpus_per_worker": 1, "gpus_per_worker": _GPU_SHARE}
        if stage.get("source", {}).get("kind") == "synthetic":
            yield f"{name}.source.num_documents", _GPU_STEPS * stage["source"]["num_documents"]


def _is_mixed(stages: Mapping[str, Any], name: str) -> bool:
    """Whether a training mixes all copies of a stage, so that none can be left out."""
    return any(f"{name}[*]" in str(stage.get("needs")) for stage in stages.values() if stage["kind"] == "train")


def _first(values: Sequence[Any] | Mapping[str, Any], most: int) -> Any:
    return dict(list(values.items())[:most]) if isinstance(values, Mapping) else list(values)[:most]
