"""Evaluations of one tiny model on a Ray cluster that says it has a GPU; where an actor should use it the CPU computes.

Run as a script, so that the cluster is its own: it writes results.json into the folder that it is given.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ray

from pipelines.engine.stage import StageContext
from pipelines.stages.evaluate import evaluation
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.host import Host
from pipelines.stages.evaluate.measures.measure import Work
from pipelines.stages.evaluate.stage import EvaluateInputs, EvaluateStage
from pipelines.stages.train import device
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal
from tests.pipelines.stages.evaluate.here import trained_on
from tests.pipelines.stages.train.training import write_tokens

PROMPTS = ("", "the 3 of ", "is")
NUM_KEPT = 4  # results that the evaluation `interrupted` keeps before its process is killed
_ON_GPU = {"gpus_per_worker": 1}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "cpu": {"batch_size": 2},
    "gpu": {"batch_size": 2, "precision": "fp32", "resources": _ON_GPU},
    "killed": {"batch_size": 2, "precision": "fp32", "resources": _ON_GPU},
    "auto": {"resources": _ON_GPU},
    "interrupted": {"batch_size": 2},
}
_LOG, _KILL = "calls.jsonl", "kill"


class Seen(NamedTuple):
    """What an actor noted of a call. `work` is its repr."""

    kind: str
    work: str
    pid: int
    gpus: list[str]
    rows: int  # sequences or windows at once; prompts


class Result(NamedTuple):
    """An evaluation's output as JSON, and the calls that were answered; before its process was killed, and after."""

    output: dict[str, Any]
    calls: list[Seen]
    calls_before: list[Seen]


def read(folder: Path) -> dict[str, Result]:
    """Results of the script, by the name of the evaluation."""
    found = json.loads((folder / "results.json").read_text())
    return {
        name: Result(output, *([Seen(*call) for call in calls] for calls in both))
        for name, (output, *both) in found.items()
    }


def artifact_of(folder: Path, name: str) -> ArtifactDir:
    """Where the evaluation of that name keeps its results."""
    return ArtifactDir.at(folder / "evaluate" / name)


def _watch() -> None:
    """In each worker process: note every call, and die in the fourth on the GPU if there is a file that says so."""
    folder = Path(os.environ["EVALUATIONS"])
    device.pick = lambda on_gpu: device.CPU
    do = Host.do

    def watched(self: Host, work: Work) -> Any:
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        log = folder / _LOG
        kill = folder / _KILL
        if gpus and kill.exists() and log.read_text().count('"0"') == 3:
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        result = do(self, work)
        of_batches = getattr(work, "batch_size", 0)
        rows = of_batches or len(getattr(work, "starts", getattr(work, "prompts", ())))
        with log.open("a") as file:
            file.write(json.dumps(Seen(type(work).__name__, repr(work), os.getpid(), gpus, rows)) + "\n")
        return result

    Host.do = watched  # type: ignore[method-assign]


def _evaluate(folder: Path, name: str) -> dict[str, Any]:
    tokens = write_tokens(folder)
    inputs = EvaluateInputs(trained=trained_on(folder, tokens), tokens=(tokens,))
    samples = {"kind": "samples", "prompts": PROMPTS, "max_new_tokens": 20, "temperature": 0.0}
    measures = [{"kind": "text"}, {"kind": "position"}, samples]
    config = EvaluateStageConfig.model_validate({"kind": "evaluate", "measures": measures, **EVALUATIONS[name]})
    with Journal(folder / f"{name}.jsonl") as journal:
        context = StageContext("evaluate", "0" * 64, artifact_of(folder, name), journal)
        return EvaluateStage().run(config, inputs, context).model_dump(mode="json")


def _connect(address: str, folder: Path) -> None:
    own = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False} if address == "local" else {}
    env_vars = {"EVALUATIONS": str(folder)}
    ray.init(
        address=address,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": _watch, "env_vars": env_vars},
        **own,
    )


def _calls(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / _LOG).read_text().splitlines()]


def _main(folder: Path) -> None:
    _connect("local", folder)
    found = {}
    for name in EVALUATIONS:
        (folder / _LOG).write_text("")
        before: list[Any] = []
        if name == "killed":
            (folder / _KILL).touch()
        if name == "interrupted":
            address = ray.get_runtime_context().gcs_address
            module = "tests.pipelines.stages.evaluate.evaluations"
            done = subprocess.run([sys.executable, "-m", module, str(folder), name, address], check=False)
            assert done.returncode == -signal.SIGKILL
            before = _calls(folder)
            (folder / _LOG).write_text("")
        output = _evaluate(folder, name)
        found[name] = (output, _calls(folder), before)
        assert not (folder / _KILL).exists()
    (folder / "results.json").write_text(json.dumps(found))


def _die_half_way(folder: Path, name: str, address: str) -> None:
    """Do the evaluation `name` in this process, and kill it when it has kept NUM_KEPT results."""
    keep, times = evaluation.keep, []

    def counted(*arguments: Any) -> None:
        keep(*arguments)
        times.append(1)
        if len(times) == NUM_KEPT:
            os.kill(os.getpid(), signal.SIGKILL)

    evaluation.keep = counted  # type: ignore[attr-defined]
    _connect(address, folder)
    _evaluate(folder, name)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _main(Path(sys.argv[1]))
    else:
        _die_half_way(Path(sys.argv[1]), *sys.argv[2:])
