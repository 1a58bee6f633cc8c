"""The unbroken run that every experiment must equal, and what of a run is compared."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.engine.runs import Run, find_run
from pipelines.engine.state import RunState
from pipelines.storage import Storage, open_storage
from tests.faults.places import environment
from tests.pipelines.end_to_end.tiny_pipeline import write_corpus

PIPELINE = Path(__file__).parent / "pipeline"
CURVES = ("train/loss", "train/lr", "train/grad_norm", "train/tokens", "valid/loss", "count/total")
"""Metrics with the same points in every run."""

_PINNED = re.compile(
    r"/model/model\.safetensors$|/hf/.*\.(safetensors|json)$|\.mds$|/index\.json$|/tokenizer\.json$|/steps\.json$"
    r"|/checkpoints/step-00000024/tensors-.*\.safetensors$"
)
_NOT_PINNED = re.compile(r"time|_per_s|mfu|duration|digest|files")  # of a record's output
_UNTOLD = re.compile(r"^system/|^train/resumed_from_step$")  # as often as a run is interrupted

Points = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Reference:
    """The finished, unbroken run."""

    folder: Path
    run: Run
    state: RunState
    bits: Mapping[str, str]
    points: Mapping[str, Points]  # by stage

    @property
    def pipeline(self) -> Path:
        """The pipeline file of all experiments."""
        return self.folder / "pipeline.yaml"

    def seconds_from(self, stage: str) -> float:
        """What an unbroken run takes that begins with this stage, at the reference's speed."""
        begun = min(_time(found.started_at) for found in self.state.stages.values())
        ended = max(_time(found.finished_at) for found in self.state.stages.values())
        return begun - _time(self.state.started_at) + ended - _time(self.state.stages[stage].started_at)

    def seconds_in(self, stage: str) -> float:
        """What the stage took."""
        found = self.state.stages[stage]
        return _time(found.finished_at) - _time(found.started_at)


def make_reference(work: Path) -> Reference:
    """Run the pipeline without a break, unless this was done in `work` with this code."""
    folder = work / f"reference-{_code()}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(PIPELINE / "counting.py", folder)
    text = (PIPELINE / "pipeline.yaml").read_text()
    (folder / "pipeline.yaml").write_text(text.replace("FOLDER", str(folder)))
    write_corpus(folder / "corpus.jsonl")
    storage = folder / "runs"
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", str(folder / "pipeline.yaml"), f"storage={storage}"],
        env=environment("reference", folder), capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"The unbroken run failed:\n{done.stdout}{done.stderr}")
    run = find_run(open_storage(storage))
    state = run.stored_state()
    return Reference(folder, run, state, bits_of(run.storage, state), points_of(run))


def _code() -> str:
    """Name of the code that makes the results."""
    trees = [f"HEAD:{folder}" for folder in ("kernels", "bmojo", "data", "pipelines/stages")]
    found = subprocess.run(["git", "rev-parse", *trees], capture_output=True, text=True, check=True)
    own = "".join(file.read_text() for file in sorted(PIPELINE.iterdir()) if file.is_file())
    return hashlib.sha256((found.stdout + own).encode()).hexdigest()[:8]


def bits_of(storage: Storage, state: RunState) -> dict[str, str]:
    """Digests of the files that hold the results, and the facts in the records, by path in the storage."""
    found = {}
    for stage in state.stages.values():
        if stage.artifact is None:
            continue
        for name in storage.files_under(stage.artifact):
            path = f"{stage.artifact}/{name}"
            if _PINNED.search(path):
                found[path] = hashlib.sha256(storage.read_bytes(path)).hexdigest()
        record = json.loads(storage.read_bytes(f"{stage.artifact}/record.json"))
        if stage.kind != "report":  # its figures are speeds
            found[f"{stage.artifact}/record.json"] = json.dumps(_pinned(record["output"]), sort_keys=True)
    return found


def _pinned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pinned(item) for key, item in value.items() if not _NOT_PINNED.search(key)}
    return [_pinned(item) for item in value] if isinstance(value, list) else value


def points_of(run: Run) -> dict[str, Points]:
    """Points by stage and metric, as the journals of all owners have them, in the order of their steps."""
    found: dict[str, Points] = {}
    for name in run.storage.list(f"{run.relpath}/journal"):
        stage = name.partition(".")[0]
        for line in run.storage.read_bytes(f"{run.relpath}/journal/{name}").splitlines():
            event = json.loads(line)
            if event.get("event") == "metrics" and stage != "+run":
                for metric, value in event["values"].items():
                    found.setdefault(stage, {}).setdefault(metric, []).append((event["step"], float(value)))
    return _sorted(found)


def mlflow_points_of(database: Path) -> dict[str, Points]:
    """Points by stage and metric, as an MLflow store has them. A stage with two runs has each point twice."""
    found: dict[str, Points] = {}
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
        rows = store.execute(
            "SELECT tags.value, metrics.key, metrics.step, metrics.value FROM metrics "
            "JOIN tags ON tags.run_uuid = metrics.run_uuid AND tags.key = 'bmojo.stage'"
        )
        for stage, metric, step, value in rows:
            found.setdefault(stage, {}).setdefault(metric, []).append((step, value))
    return _sorted(found)


def _sorted(points: dict[str, Points]) -> dict[str, Points]:
    return {
        stage: {name: sorted(values) for name, values in metrics.items() if not _UNTOLD.search(name)}
        for stage, metrics in points.items()
    }


def differing_points(where: str, found: Mapping[str, Points], wanted: Mapping[str, Points]) -> Iterator[str]:
    """Points that are there twice; those of CURVES that are missing or have another value."""
    for stage, metrics in found.items():
        for name, points in metrics.items():
            twice = [step for step, count in Counter(step for step, _ in points).items() if count > 1]
            if twice:
                yield f"{where}: {stage} has {name} twice at steps {twice[:5]}"
    for stage, metrics in wanted.items():
        for name in set(metrics) & set(CURVES):
            points = found.get(stage, {}).get(name, [])
            missing = [step for step, _ in metrics[name] if step not in {step for step, _ in points}]
            if missing:
                yield f"{where}: {stage} lacks {name} at steps {missing[:5]}"
            elif dict(points) != dict(metrics[name]):
                yield f"{where}: {stage} has other values of {name}"


def _time(at: str | None) -> float:
    assert at is not None
    return datetime.fromisoformat(at).timestamp()
