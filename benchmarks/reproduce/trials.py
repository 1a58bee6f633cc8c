"""Trials: one training with its evaluation, of one seed. What is finished of a recipe is known from its plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.reproduce.recipes import Setting, recipe_file
from bmojo.counting import ModelCounts, count
from pipelines.api.results import output_of
from pipelines.engine.plan import Action, PlannedStage
from pipelines.engine.records import StageRecord, read_record
from pipelines.loading import load_pipeline
from pipelines.session import open_pipeline
from pipelines.stages.evaluate.results import Curve
from pipelines.stages.evaluate.stage import EvaluateOutput
from pipelines.stages.tokenize.stage import planned_vocab_size
from pipelines.stages.train.config import TrainStageConfig
from pipelines.stages.train.stage import TrainOutput, padded_vocab_size

Name = tuple[str, ...]
"""What tells trials apart, the seed excepted: the values of `foreach`, such as ("drifting", "tau_40")."""


class Finished(NamedTuple):
    """What came out. `figures` and `curves` by `<measure>/<name>`; `commits`: of the code that made it."""

    figures: Mapping[str, float]
    curves: Mapping[str, Curve]
    train_time_s: float  # of the steps alone
    duration_s: float  # of both stages, with starts and evaluation
    commits: frozenset[str]


@dataclass(frozen=True)
class Trial:
    """One training and its evaluation."""

    name: Name
    seed: str
    counts: ModelCounts
    num_tokens: int  # trained on
    finished: Finished | None

    @property
    def flops(self) -> float:
        """Of the training."""
        return self.num_tokens * self.counts.train_flops_per_token


def trials_of(recipe: str, setting: Setting) -> list[Trial]:
    """All trials of a recipe, in its order. Raises: UserError, ConfigError: it cannot be planned here."""
    path, overrides = recipe_file(recipe), setting.overrides(recipe)
    pipeline = open_pipeline(load_pipeline(path, overrides), path, overrides, is_for_here=False)
    stages = {stage.name: stage for stage in pipeline.plan()}
    return [_trial(stage, stages) for stage in stages.values() if stage.kind == "train"]


def by_name(trials: Iterable[Trial]) -> dict[Name, list[Trial]]:
    """Trials of each name, its seeds in their order."""
    found: dict[Name, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.name, []).append(trial)
    return found


def _trial(train: PlannedStage, stages: Mapping[str, PlannedStage]) -> Trial:
    template, *values, seed = train.name.split("-")
    config, tokens = train.config, train.node.inputs.tokens[0]
    assert isinstance(config, TrainStageConfig)
    assert template == "train", f"{train.name}: expected the name train-VALUES-SEED"
    seq_len = tokens.config.seq_len
    model = config.model.with_vocab_size(padded_vocab_size(planned_vocab_size(tokens)))
    evaluate = stages["-".join(["evaluate", *values, seed])]
    return Trial(
        name=tuple(values),
        seed=seed,
        counts=count(model, seq_len),
        num_tokens=config.num_samples(config.num_steps(seq_len)) * seq_len,
        finished=_finished(train, evaluate),
    )


def _finished(train: PlannedStage, evaluate: PlannedStage) -> Finished | None:
    records = [read_record(stage.artifact) for stage in (train, evaluate) if stage.action is Action.REUSE]
    found = [record for record in records if record is not None]
    if len(found) < 2:
        return None
    trained, evaluated = map(output_of, found)
    assert isinstance(trained, TrainOutput)
    assert isinstance(evaluated, EvaluateOutput)
    results = evaluated.results
    return Finished(
        figures={f"{result.name}/{figure.name}": figure.value for result in results for figure in result.figures},
        curves={f"{result.name}/{curve.name}": curve for result in results for curve in result.curves},
        train_time_s=trained.train_time_s,
        duration_s=sum(record.duration_s for record in found),
        commits=frozenset(_commits(found)),
    )


def _commits(records: Iterable[StageRecord]) -> Iterator[str]:
    return (record.git_commit[:7] for record in records if record.git_commit)
