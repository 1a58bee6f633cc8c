"""Trainings under Ray on the simulated device, beside the same ones by DeepSpeed on the CPU; in a process of its own.

python -m tests.pipelines.stages.train.neuron_driver FOLDER, with the simulated device on PYTHONPATH.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ray

from pipelines.errors import LostError
from pipelines.stages.train import layout
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.launch import run_training
from pipelines.stages.train.stage import TrainInputs, make_job
from tests.pipelines.stages.train.training import FileSink, Tokens, context_of, write_tokens

MODEL: dict[str, Any] = {
    "pattern": "(bmojo,mamba2)*1",
    "d_model": 64,
    "num_heads": 2,
    "window_size": 32,
    "chunk_size": 16,
    "num_eidetic": 8,
    "d_state": 16,
    "ssm_head_dim": 32,
}
BY_DEEPSPEED: dict[str, Any] = {"resources": {"num_workers": 2}}
ON_CORES: dict[str, Any] = {"resources": {"num_workers": 2, "neuron_cores_per_worker": 1}}
BY_NEURON: dict[str, Any] = {"backend": {"kind": "neuron", "parallel": "zero1"}, **ON_CORES}
BY_FSDP2: dict[str, Any] = {"backend": {"kind": "neuron", "parallel": "fsdp2"}, **ON_CORES}


def config_of(by: dict[str, Any]) -> TrainStageConfig:
    """12 steps in float32 with a checkpoint every 6.

    AdamW divides by the size of a gradient: with a small eps one that is all rounding would move its weight as far as
    others, and the two backends' operators round in different places.
    """
    fields = {
        "kind": "train", "model": MODEL, "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 12,
        "warmup_steps": 2, "needs": ("tokens",), "checkpoint_every_steps": 6, "log_every_steps": 1,
        "validation_batches": 2, "lr": 1e-3, "eps": 1e-3, "precision": "fp32", "check_replicas_every_steps": 3,
    }  # fmt: skip
    return TrainStageConfig.model_validate(fields | by)


def train(by: dict[str, Any], tokens: Tokens, folder: Path, kill_at_step: int | None = None) -> dict[str, Any]:
    """Train in a folder, on from what is there. A killed training is started again. Returns losses and tags."""
    folder.mkdir(parents=True, exist_ok=True)
    sink = FileSink(folder / "metrics.jsonl", kill_at_step)
    job = make_job(config_of(by), TrainInputs((tokens,)), context_of(folder / "train-0"), sink)
    was_killed = False
    try:
        facts = run_training(job)
    except LostError:
        was_killed = True
        facts = run_training(job, attempt=2)
    reports = sorted((folder / "train-0").glob("resumes/*.json"))
    return {
        "losses": sink.points("train/loss"),
        "valid": sink.points("valid/loss"),
        "was_killed": was_killed,
        "devices": facts.devices,
        "paths": {name: text for tags in sink.tags() for name, text in tags.items() if name.startswith("bmojo.path")},
        "resumes": [json.loads(report.read_text().partition("\n#")[0]) for report in reports],
    }


def on_from_halfway(by: dict[str, Any], tokens: Tokens, source: Path, folder: Path) -> dict[str, Any]:
    """Go on from a copy of another training's checkpoint of step 6."""
    shutil.copytree(source / "train-0" / layout.step_dir(6), folder / "train-0" / layout.step_dir(6))
    return train(by, tokens, folder)


def main(folder: Path) -> None:
    """Run all, and write what was seen."""
    (folder / "tokens").mkdir()
    tokens = write_tokens(folder / "tokens")
    ray.init(
        address="local", num_cpus=4, resources={"neuron_cores": 2}, include_dashboard=False, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    found = {"deepspeed": train(BY_DEEPSPEED, tokens, folder / "deepspeed")}
    found["neuron"] = train(BY_NEURON, tokens, folder / "neuron", kill_at_step=8)
    found["neuron by fsdp2"] = train(BY_FSDP2, tokens, folder / "fsdp2")
    found["neuron after deepspeed"] = on_from_halfway(BY_NEURON, tokens, folder / "deepspeed", folder / "there")
    found["deepspeed after neuron"] = on_from_halfway(BY_DEEPSPEED, tokens, folder / "neuron", folder / "back")
    (folder / "found.json").write_text(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
