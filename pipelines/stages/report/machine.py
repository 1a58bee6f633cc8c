"""A report for programs: the same figures as JSON, and as one long table for trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from base.sealed import dumps
from pipelines.stages.report.comparison import Column
from pipelines.stages.report.identity import RunIdentity
from pipelines.stages.report.subjects import Group, Subject
from pipelines.stages.sections import Table

COLUMNS = (
    "model", "measure", "figure", "value", "low", "high", "delta", "delta_low", "delta_high", "unit", "better",
    "is_best", "is_baseline", "seeds", "num_units",
)  # fmt: skip


def figure_rows(columns: Sequence[Column], groups: Sequence[Group], baseline: str) -> list[dict[str, Any]]:
    """A row per model and figure, by COLUMNS. Null: not known."""
    rows = []
    for column in columns:
        for group in groups:
            cell = column.cells.get(group.name)
            if cell is None:
                continue
            delta = cell.delta or (None, None, None)
            values = (
                group.name, column.measure, column.figure.name, *cell.estimate, *delta, column.figure.unit,
                column.figure.better, group.name == column.best, group.name == baseline, len(group.members),
                column.num_units[group.name][0],
            )  # fmt: skip
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def report_json(
    *,
    title: str,
    runs: Sequence[RunIdentity],
    baseline: str,
    rows: Sequence[Mapping[str, Any]],
    verdicts: Sequence[str],
    subjects: Sequence[Subject],
    tables: Sequence[Table],
) -> str:
    """All that the page says, but for generated text and the curves of trainings, which are in their history.json.

    Numbers that JSON lacks are the strings NaN, Infinity and -Infinity.
    """
    value = {
        "title": title,
        "runs": [asdict(run) for run in runs],
        "baseline": baseline,
        "results": rows,
        "verdicts": verdicts,
        "models": [{"model": subject.name, **subject.facts} for subject in subjects],
        "curves": _curves(subjects),
        "tables": [asdict(table) for table in tables],
    }
    return dumps(value, indent=1, ensure_ascii=False) + "\n"


def _curves(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    return [
        {"model": subject.name, "measure": name, **curve.model_dump(mode="json")}
        for subject in subjects
        for name, measured in subject.measured.items()
        for curve in measured.result.curves
    ]
