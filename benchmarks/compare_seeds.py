"""The models of configs/compare.yaml over several seeds, and over the values of one model field.

Trains every variant as a stage of ordinary pipelines (`bmojo run`), so the same command resumes a killed benchmark, and
prints the final validation losses as Markdown. Example: what `fading_output` is worth, three seeds each:

    python -m benchmarks.compare_seeds --models bmojo bmojo_f --field fading_output=memory,memory_and_residual
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.engine.records import Artifacts
from pipelines.storage import open_storage

RECIPE = Path(__file__).parent.parent / "configs" / "compare.yaml"


@dataclass(frozen=True)
class Variant:
    """A copy of the recipe's train stage with one model field and the seed changed."""

    model: str
    field: str | None
    value: str | None
    seed: int

    @property
    def stage(self) -> str:
        parts = [self.model, self.value, f"seed{self.seed}"]
        return re.sub(r"[^a-z0-9]+", "-", "-".join(part for part in parts if part).lower())

    @property
    def row(self) -> str:
        return f"{self.model}, {self.field}: {self.value}" if self.field else self.model

    def config(self, recipe: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
        stage = copy.deepcopy(recipe["stages"]["train"])
        stage["model"] |= stage.pop("foreach")["model"][self.model]
        stage["seed"] = self.seed
        if self.field:
            stage["model"][self.field] = yaml.safe_load(str(self.value))
        stage["precision"] = arguments.precision
        if arguments.gpu:
            stage["micro_batch_size"] = stage["global_batch_size"]
            stage["resources"] = {"num_workers": 1, "gpus_per_worker": 1, "cpus_per_worker": 1}
        if arguments.steps:
            stage |= {"max_steps": arguments.steps, "warmup_steps": arguments.steps // 8}
        return dict(stage)


def main() -> int:
    """Run what is not there yet, then report. Returns the exit code of the first pipeline that failed."""
    arguments = _parse()
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    data = {name: recipe["stages"][name] for name in ("tokenizer", "tokens")}
    if arguments.paths:
        for stage in data.values():
            stage["source"] = {"kind": "files", "paths": arguments.paths}
    field, _, values = (arguments.field or "").partition("=")
    variants = [
        Variant(model, field or None, value or None, seed)
        for model, value, seed in itertools.product(arguments.models, values.split(","), arguments.seeds)
    ]
    folder = Path(arguments.storage).absolute() / "compare_seeds"
    folder.mkdir(parents=True, exist_ok=True)
    if code := _run(folder, [("data", data)]):
        return code
    shares = [variants[start :: arguments.parallel] for start in range(min(arguments.parallel, len(variants)))]
    jobs = [
        (f"share{number}", data | {variant.stage: variant.config(recipe, arguments) for variant in share})
        for number, share in enumerate(shares)
    ]
    if code := _run(folder, jobs):
        return code
    losses = {variant: _final_loss(folder, variant) for variant in variants}
    print(_table(losses))
    (folder / "losses.json").write_text(
        json.dumps([{**vars(variant), **facts} for variant, facts in losses.items()], indent=2) + "\n"
    )
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_seeds", description=__doc__)
    models = ["bmojo", "bmojo_f", "mamba2", "swa", "attention"]
    parser.add_argument("--models", nargs="+", default=models, choices=models, help="models of the recipe")
    parser.add_argument("--field", help="a field of the model and its values: NAME=VALUE,VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps, if not the recipe's")
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--paths", nargs="+", help="text files instead of the recipe's source (see data.config)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--gpu", action="store_true", help="train on a GPU, one worker")
    parser.add_argument("--parallel", type=int, default=1, help="pipelines that run at the same time")
    return parser.parse_args()


def _run(folder: Path, jobs: list[tuple[str, dict[str, Any]]]) -> int:
    """Run pipelines side by side; each one's output goes to NAME.log beside its YAML file."""
    processes = []
    for name, stages in jobs:
        cluster = {"num_cpus": 2}  # room for one stage's workers; many small clusters share the machine
        pipeline = {"name": f"compare-seeds-{name}", "storage": str(folder), "cluster": cluster, "stages": stages}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
        with open(folder / f"{name}.log", "w") as log:
            command = [sys.executable, "-m", "pipelines", "run", str(folder / f"{name}.yaml")]
            processes.append((name, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)))
    codes = [(name, process.wait()) for name, process in processes]
    for name, code in codes:
        if code:
            print(f"error: pipeline {name} ended with exit code {code}: see {folder / f'{name}.log'}", file=sys.stderr)
    return next((code for _, code in codes if code), 0)


def _final_loss(folder: Path, variant: Variant) -> dict[str, Any]:
    record = Artifacts(open_storage(folder)).latest("train", variant.stage)
    assert record is not None, f"no record of {variant.stage}"
    return {name: record.output[name] for name in ("final_valid_loss", "num_params", "tokens_seen", "tokens_per_s")}


def _table(losses: dict[Variant, dict[str, Any]]) -> str:
    lines = ["| model | mean | losses by seed | parameters |", "| --- | --- | --- | --- |"]
    rows = dict.fromkeys(variant.row for variant in losses)
    for row in rows:
        found = [facts for variant, facts in losses.items() if variant.row == row]
        values = [facts["final_valid_loss"] for facts in found]
        each = ", ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {row} | **{statistics.mean(values):.3f}** | {each} | {found[0]['num_params']:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
