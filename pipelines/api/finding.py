"""Runs and stages as people name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from base.errors import UserError
from base.names import suggest
from pipelines.engine.events import RunInfo
from pipelines.engine.runs import RUNS, Run, find_run
from pipelines.storage import Storage, open_storage


class RunAndStage(NamedTuple):
    """A run, and one of its stages if one was named."""

    run: Run
    stage: str | None


def find_run_anywhere(storage: Storage, word: str) -> Run:
    """A run as find_run finds it in the storage; or, of any storage, by its folder or URL, as `bmojo status` shows it.

    Raises: UserError: there is no such run.
    """
    if "/" not in word:
        return find_run(storage, word)
    parent, _, name = word.rstrip("/").rpartition("/")
    root, _, folder = parent.rpartition("/")
    if folder != RUNS or not name:
        raise UserError(
            f"{word!r} is not the folder of a run. Expected STORAGE/{RUNS}/RUN, as `bmojo status` shows it."
        )
    return find_run(open_storage(root or "."), name)


def find_stage(storage: Storage, words: Sequence[str]) -> RunAndStage:
    """The run and stage meant by `[RUN] [STAGE]`: one word is a run, or else a stage of the latest run.

    Raises: UserError: there is no such run or stage; says which names are near.
    """
    if len(words) > 2:
        raise UserError(f"Found {len(words)} names ({' '.join(words)}), expected at most two: a run and a stage.")
    if not words:
        return RunAndStage(find_run(storage), None)
    if len(words) == 2:
        run = find_run(storage, words[0])
        return RunAndStage(run, known_stage(run, words[1]))
    try:
        return RunAndStage(find_run(storage, words[0]), None)
    except UserError as error:
        latest = find_run(storage)
        stages = latest.info().fingerprints
        if words[0] in stages:
            return RunAndStage(latest, words[0])
        near = suggest(words[0], list(stages))
        raise UserError(f"{error} Nor has the latest run, {latest.run_id}, a stage of that name.{near}") from None


def known_stage(run: Run, stage: str) -> str:
    """The stage. Raises UserError: the run has none of that name."""
    stages = list(run.info().fingerprints)
    if stage not in stages:
        raise UserError(f"Run {run.run_id} has no stage {stage!r}.{suggest(stage, stages)}")
    return stage


def require_kind(run: Run, stage: str, kind: str) -> None:
    """Raises UserError: the stage is of another kind; names the run's stages of this one."""
    kinds = run.info().kinds
    if kinds.get(stage) != kind:
        names = [name for name, found in kinds.items() if found == kind]
        raise UserError(
            f"Stage {stage} of run {run.run_id} is a {kinds.get(stage)} stage, expected a {kind} stage. This run's: "
            f"{', '.join(names) or 'none'}."
        )


def needs_of(info: RunInfo, stage: str) -> tuple[str, ...]:
    """Names of the stages that a stage reads, in the order of the pipeline file."""
    needs = info.config.get("stages", {}).get(stage, {}).get("needs", ())
    groups: Iterable[str | Sequence[str]] = needs.values() if isinstance(needs, dict) else needs
    return tuple(name for group in groups for name in ((group,) if isinstance(group, str) else group))
