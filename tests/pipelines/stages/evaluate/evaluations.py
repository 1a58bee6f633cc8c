"""Evaluations of one tiny model on a Ray cluster that says it has a GPU; where an actor should use it the CPU computes.

Run as a script, so that the cluster is its own: it writes results.json into the folder that it is given.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ray

from bmojo import BMojoLM
from bmojo.checkpoint_io import save_pretrained
from pipelines.engine.stage import StageNode, StageResult
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.evaluation import evaluate
from pipelines.stages.evaluate.work import Evaluator
from pipelines.stages.train import device
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.stage import TrainInputs, TrainOutput, TrainStage
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal
from tests.pipelines.stages.train.training import Tokens, write_tokens
from tests.pipelines.stages.trained_run import tiny_model

PROMPTS = ("", "the 3 of ", "is")
_ON_GPU = {"gpus_per_worker": 1}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "cpu": {"batch_size": 2},
    "gpu": {"batch_size": 2, "precision": "fp32", "resources": _ON_GPU},
    "killed": {"batch_size": 2, "precision": "fp32", "resources": _ON_GPU},
    "auto": {"resources": _ON_GPU},
}
_LOG, _KILL = "calls.jsonl", "kill"


class Seen(NamedTuple):
    """What an actor noted of a call."""

    method: str
    pid: int
    gpus: list[str]
    rows: int  # sequences or windows at once; prompts


class Result(NamedTuple):
    """An evaluation's output as JSON, and the calls that were answered."""

    output: dict[str, Any]
    calls: list[Seen]


def read(folder: Path) -> dict[str, Result]:
    """Results of the script, by the name of the evaluation."""
    found = json.loads((folder / "results.json").read_text())
    return {name: Result(output, [Seen(*call) for call in calls]) for name, (output, calls) in found.items()}


def _watch() -> None:
    """In each worker process: note every call, and die in the fourth on the GPU if there is a file that says so."""
    folder = Path(os.environ["EVALUATIONS"])
    device.pick = lambda on_gpu: device.CPU
    for name in ("score_batches", "score_windows", "continue_texts", "gzip_bits_per_byte"):
        setattr(Evaluator, name, _watched(name, getattr(Evaluator, name), folder))


def _watched(name: str, method: Any, folder: Path) -> Any:
    def call(self: Evaluator, *arguments: Any) -> Any:
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        log = folder / _LOG
        kill = folder / _KILL
        if gpus and kill.exists() and log.read_text().count('"0"') == 3:
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(self, *arguments)
        rows = arguments[1] if name == "score_batches" else len(arguments[0]) if arguments else 0
        with log.open("a") as file:
            file.write(json.dumps(Seen(name, os.getpid(), gpus, rows)) + "\n")
        return result

    return call


def _trained(folder: Path, tokens: Tokens) -> StageNode[TrainStage]:
    model: BMojoLM = tiny_model()
    model.init_weights(seed=1)
    save_pretrained(model, folder / "train" / "model")
    config = TrainStageConfig.model_validate(
        {"kind": "train", "model": model.config, "global_batch_size": 1, "micro_batch_size": 1, "max_steps": 1}
        | {"warmup_steps": 0}
    )
    output = TrainOutput(
        num_params=1, steps=1, tokens_seen=1, final_train_loss=1.0, initial_valid_loss=None, final_valid_loss=None,
        train_time_s=1.0, tokens_per_s=1.0, mfu=None, model="model", history="", tokenizer=None, seq_len=64,
        vocab_size=320,
    )  # fmt: skip
    result = StageResult("0" * 64, ArtifactDir.at(folder / "train"), output)
    return StageNode("train", TrainStage(), config, TrainInputs((tokens,)), result)


def _main(folder: Path) -> None:
    tokens = write_tokens(folder)
    trained = _trained(folder, tokens)
    runtime_env = {"worker_process_setup_hook": _watch, "env_vars": {"EVALUATIONS": str(folder)}}
    ray.init(
        address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env
    )
    found = {}
    for name, fields in EVALUATIONS.items():
        (folder / _LOG).write_text("")
        if name == "killed":
            (folder / _KILL).touch()
        sample = {"prompts": PROMPTS, "max_new_tokens": 20, "temperature": 0.0}
        config = EvaluateStageConfig.model_validate({"kind": "evaluate", "sample": sample, **fields})
        output = evaluate(config, trained, tokens, Journal(folder / f"{name}.jsonl"))
        calls = [json.loads(line) for line in (folder / _LOG).read_text().splitlines()]
        found[name] = (output.model_dump(mode="json"), calls)
        assert not (folder / _KILL).exists()
    (folder / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
