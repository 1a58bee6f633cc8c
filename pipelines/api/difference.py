"""Two runs side by side: the settings that differ, and the final figures."""

from __future__ import annotations

from typing import Any

from base.errors import UserError
from pipelines.api.results import output_of, stage_record
from pipelines.engine.events import Status
from pipelines.engine.fingerprint import flatten
from pipelines.engine.headline import figures_of
from pipelines.engine.records import StageRecord
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts
from pipelines.engine.state import StageState


class FieldDifference(Facts):
    """A setting that differs; None where a run has no such field."""

    field: str
    first: Any
    second: Any
    only_in: str | None  # the run that alone has it


class FigureDifference(Facts):
    """A final figure of both runs, or of one."""

    figure: str
    first: float | None
    second: float | None
    difference: float | None  # second - first
    relative: float | None  # difference / |first|


class StageDifference(Facts):
    """A stage whose result is not the same in both runs."""

    stage: str
    first: Status | None
    second: Status | None
    first_s: float | None  # time it took to make the result
    second_s: float | None


class RunDifference(Facts):
    """What differs between two runs."""

    first: str
    second: str
    config: tuple[FieldDifference, ...]
    figures: tuple[FigureDifference, ...]
    stages: tuple[StageDifference, ...]  # those with different results


def diff(first: Run, second: Run) -> RunDifference:
    """Compare two runs, of one storage or two. Raises UserError: one has no readable history."""
    infos = first.info(), second.info()
    configs = [flatten(info.config) for info in infos]
    fields = []
    for name in [*configs[0], *(name for name in configs[1] if name not in configs[0])]:
        has = [name in config for config in configs]
        one, other = (config.get(name) for config in configs)
        if one != other or has[0] != has[1]:
            only_in = None if all(has) else (first if has[0] else second).run_id
            fields.append(FieldDifference(field=name, first=one, second=other, only_in=only_in))
    found = _final_figures(first), _final_figures(second)
    names = [*found[0], *(name for name in found[1] if name not in found[0])]
    return RunDifference(
        first=first.run_id,
        second=second.run_id,
        config=tuple(fields),
        figures=tuple(_compared(name, found[0].get(name), found[1].get(name)) for name in names),
        stages=tuple(_stages(first, second)),
    )


def _final_figures(run: Run) -> dict[str, float]:
    """By the names that MLflow shows them under."""
    stages = run.stored_state().stages
    kinds = {name: stage.kind for name, stage in stages.items()}
    found: dict[str, float] = {}
    for name, stage in stages.items():
        record = _readable_record(run, stage)
        output = None if record is None else output_of(record)
        if output is not None:
            found |= figures_of(kinds, name, output)
    return found


def _readable_record(run: Run, stage: StageState | None) -> StageRecord | None:
    """The next run reports a damaged record, not this view."""
    try:
        return None if stage is None else stage_record(run, stage)
    except UserError:
        return None


def _compared(name: str, first: float | None, second: float | None) -> FigureDifference:
    difference = None if first is None or second is None else second - first
    relative = difference / abs(first) if difference is not None and first else None
    return FigureDifference(figure=name, first=first, second=second, difference=difference, relative=relative)


def _stages(first: Run, second: Run) -> list[StageDifference]:
    states = first.state().stages, second.state().stages
    found = []
    for name in [*states[0], *(name for name in states[1] if name not in states[0])]:
        one, other = (stages.get(name) for stages in states)
        if one is not None and other is not None and one.fingerprint == other.fingerprint:
            continue
        times = [
            None if record is None else record.duration_s
            for record in (_readable_record(first, one), _readable_record(second, other))
        ]
        found.append(
            StageDifference(
                stage=name,
                first=None if one is None else one.status,
                second=None if other is None else other.status,
                first_s=times[0],
                second_s=times[1],
            )
        )
    return found
