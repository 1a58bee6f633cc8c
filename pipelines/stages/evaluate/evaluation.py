"""The course of an evaluation: the tasks of its measures, their results, kept, and what these amount to."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.stages.actors import Call, call_actors
from pipelines.stages.evaluate.config import EvaluateStageConfig
from pipelines.stages.evaluate.host import Equipment, Host
from pipelines.stages.evaluate.kept import keep, kept
from pipelines.stages.evaluate.measures import measure_of
from pipelines.stages.evaluate.measures.measure import AnyMeasure, MeasureConfig, Setting, Task, Units
from pipelines.stages.evaluate.results import MeasureResult
from pipelines.stages.evaluate.subject import Subject
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.journal import Journal

UNITS = "units"


@dataclass(frozen=True)
class _Part:
    """A measure of this evaluation, its tasks, and the results by key."""

    config: MeasureConfig
    measure: AnyMeasure
    tasks: list[Task]
    results: dict[str, Any] = field(default_factory=dict)


def evaluate(setting: Setting, subject: Subject, artifact: ArtifactDir, journal: Journal) -> tuple[MeasureResult, ...]:
    """Do what is not done yet in Ray actors. Raises as call_actors, and what the measures raise."""
    parts = []
    for config in setting.config.measures:
        measure = measure_of(config)
        tasks = measure.tasks(config, setting)
        keys = [task.key for task in tasks]
        assert len(set(keys)) == len(keys), f"{config.called}: two tasks have one key"
        parts.append(_Part(config, measure, tasks, kept(artifact, config.called, keys)))
    _do_tasks(parts, setting, subject, artifact, journal)
    return tuple(_reduce(part, setting, artifact) for part in parts)


def _do_tasks(parts: list[_Part], setting: Setting, subject: Subject, artifact: ArtifactDir, journal: Journal) -> None:
    num_tasks, num_done = (
        sum(len(found) for found in each) for each in zip(*((part.tasks, part.results) for part in parts), strict=True)
    )
    journal.log_metrics(num_done, {"evaluate/tasks_total": num_tasks, "evaluate/tasks_done": num_done})
    left = [(part, task) for part in parts for task in part.tasks if task.key not in part.results]
    left.sort(key=lambda one: one[1].turn)
    if not left:
        return
    calls = [Call("do", (task.work,), task.resources) for _, task in left]
    for number, result in call_actors(Host, (equipment_of(setting, subject),), calls):
        part, task = left[number]
        keep(artifact, part.config.called, task.key, result)
        part.results[task.key] = result
        num_done += 1
        journal.log_metrics(num_done, {"evaluate/tasks_done": num_done})


def equipment_of(setting: Setting, subject: Subject) -> Equipment:
    """What actors are made of."""
    config: EvaluateStageConfig = setting.config
    return Equipment(
        subject=subject,
        tokens=tuple(node.artifact for node in setting.tokens),
        tokenizer_path=TOKENIZER_FOLDER if setting.is_text else None,
        batch_tokens=config.rows(setting.seq_len) * setting.seq_len,
        num_threads=config.resources.cpus_per_worker,
        on_gpu=config.on_gpu,
        bf16=config.used_precision == "bf16",
    )


def _reduce(part: _Part, setting: Setting, artifact: ArtifactDir) -> MeasureResult:
    results = {task.key: part.results[task.key] for task in part.tasks}
    measured = part.measure.reduce(part.config, setting, results)
    if measured.units is None:
        return measured.result
    name = f"{UNITS}/{part.config.called}.npz"
    artifact.write_bytes(name, _packed(measured.units))
    return measured.result.model_copy(update={"units": name})


def _packed(units: Units) -> bytes:
    arrays = {"identity": np.array(units.identity)}
    for name, ratio in units.ratios.items():
        arrays[f"{name}.numerator"] = ratio.numerator_n.astype(np.float64)
        arrays[f"{name}.denominator"] = ratio.denominator_n.astype(np.float64)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
