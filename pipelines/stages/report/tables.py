"""The tables of a report: figures side by side, models, settings that differ. Cells are text with a key to sort by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.stages.numbers import shown
from pipelines.stages.report.comparison import Cell, Column
from pipelines.stages.report.subjects import Group, Subject
from pipelines.stages.sections import Table


@dataclass(frozen=True)
class TableCell:
    """One cell. `small`: below the text; `key`: what rows are sorted by; `mark`: a word that stands out."""

    text: str
    small: str = ""
    key: float | str | None = None
    mark: str = ""

    @property
    def plain(self) -> str:
        """All of it on one line."""
        small = f" ({self.small})" if self.small else ""
        return f"{self.text}{small}{f' {self.mark}' if self.mark else ''}"


@dataclass(frozen=True)
class Grid:
    """A table whose rows can be sorted. `faint`: rows at the end that are for orientation."""

    columns: tuple[TableCell, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    faint: tuple[tuple[TableCell, ...], ...] = ()


@dataclass(frozen=True)
class MeasureGrid:
    """All figures of one measure. `about`: how many units, and of what."""

    name: str
    grid: Grid
    about: str


_MODEL = TableCell("model")
_NONE = TableCell("-")


def results_grid(columns: Sequence[Column], groups: Sequence[Group], baseline: str) -> Grid:
    """A row per group: each figure with its interval, and its difference to the baseline if there are several."""
    with_delta = {column.key for column in columns if any(cell.delta is not None for cell in column.cells.values())}
    heads = [_MODEL]
    for column in columns:
        heads.append(_head(column))
        if column.key in with_delta:
            heads.append(TableCell(f"Δ {column.title}"))
    rows = []
    for group in groups:
        mark = "baseline" if len(groups) > 1 and group.name == baseline else ""
        row = [TableCell(group.label, key=group.name, mark=mark)]
        for column in columns:
            row.append(_value_cell(column, group.name))
            if column.key in with_delta:
                row.append(_delta_cell(column.cells.get(group.name)))
        rows.append(tuple(row))
    return Grid(tuple(heads), tuple(rows), tuple(_reference_rows(columns, with_delta)))


def measure_grids(columns: Sequence[Column], groups: Sequence[Group], baseline: str) -> list[MeasureGrid]:
    """All figures, by measure."""
    found = []
    for name in dict.fromkeys(column.measure for column in columns):
        of_measure = [column for column in columns if column.measure == name]
        about = f"On {_units_in_words(of_measure)}."
        found.append(MeasureGrid(name, results_grid(of_measure, groups, baseline), about))
    return found


def _units_in_words(columns: Sequence[Column]) -> str:
    """How many units, by what they are: `31 documents`; of several measures or models, all numbers."""
    counted = [(unit, count) for column in columns for count, unit in column.num_units.values()]
    counts = {unit: sorted({count for of, count in counted if of == unit}) for unit, _ in counted}
    return ", ".join(f"{' or '.join(f'{count:,}' for count in found)} {unit}s" for unit, found in counts.items())


def _head(column: Column) -> TableCell:
    """The figure and which way is better; below it the unit, and what guessing gets."""
    figure = column.figure
    unit = figure.unit if figure.unit != column.title else ""
    chance = f"chance {shown(figure.chance).value}" if figure.chance is not None else ""
    arrow = "↓" if figure.better == "lower" else "↑"
    return TableCell(f"{column.title} {arrow}", ", ".join(text for text in (unit, chance) if text))


def _value_cell(column: Column, group: str) -> TableCell:
    cell = column.cells.get(group)
    if cell is None:
        return _NONE
    text = shown(*cell.estimate)
    return TableCell(text.value, text.interval, cell.estimate.value, "best" if column.best == group else "")


def _delta_cell(cell: Cell | None) -> TableCell:
    if cell is None or cell.delta is None:
        return _NONE
    text = shown(*cell.delta, signed=True)
    return TableCell(text.value, text.interval, cell.delta.value)


def _reference_rows(columns: Sequence[Column], with_delta: set[str]) -> list[tuple[TableCell, ...]]:
    names = dict.fromkeys(reference.name for column in columns for reference in column.references)
    rows = []
    for name in names:
        row = [TableCell(name)]
        for column in columns:
            found = next((one for one in column.references if one.name == name), None)
            ends = () if found is None else (min(found.values), max(found.values))
            text = " to ".join(dict.fromkeys(shown(end).value for end in ends))
            row.append(TableCell(text) if text else _NONE)
            if column.key in with_delta:
                row.append(_NONE)
        rows.append(tuple(row))
    return rows


def verdicts(columns: Sequence[Column], groups: Sequence[Group]) -> list[str]:
    """What may be said about each figure, in a sentence; nothing about a single model."""
    labels = {group.name: group.label for group in groups}
    found = []
    for column in columns:
        ranked = column.ranked()
        if len(ranked) < 2:
            continue
        first = labels[ranked[0]]
        if column.best is not None:
            found.append(
                f"{column.title}: {first} is best. The 95 % interval of its difference to each other model excludes 0"
                f"{_ONE_SEED if any(not group.is_replicated for group in groups) else ''}."
            )
        elif column.tied:
            others = ", ".join(labels[name] for name in column.tied)
            found.append(
                f"{column.title}: no model is clearly best. {first} has the best value; what cannot be told apart from "
                f"it: {others}."
            )
        else:
            found.append(f"{column.title}: {first} has the best value. Not every difference to it has an interval.")
        found += [f"{column.title}: {problem}." for problem in column.problems]
    return found


_ONE_SEED = ", on these units with one seed each; what another seed would change is not measured"


def how_to_read(columns: Sequence[Column], groups: Sequence[Group], baseline: str) -> list[str]:
    """What these figures were measured on, and what their intervals and differences are."""
    if not columns:
        return []
    found = [f"Measured on {_units_in_words(columns)}."]
    cells = [cell for column in columns for cell in column.cells.values()]
    if any(cell.estimate.low is not None for cell in cells):
        found.append("Small figures are 95 % intervals; digits end where the interval makes them meaningless.")
    if any(one.is_replicated for one in groups):
        found.append(
            "Models that differ in their seed alone are one row: the mean, with Student's interval over the seeds, "
            "which says what another seed would give on these documents."
        )
    if any(cell.delta is not None for cell in cells):
        label = next(one.label for one in groups if one.name == baseline)
        found.append(f"Δ is the difference to {label}. {_of_difference(groups)}")
    return found


def _of_difference(groups: Sequence[Group]) -> str:
    paired = (
        "Of two single models it is paired, unit by unit, so that what is hard for both cancels; what another seed "
        "would change is not in it."
    )
    over_seeds = (
        "Over seeds it has Student's interval: of the differences seed by seed if both models have the same seeds, "
        "else with a spread of each model's own (Welch). Without an interval one of the two has a single seed."
    )
    if all(one.is_replicated for one in groups):
        return over_seeds
    return f"{paired} {over_seeds}" if any(one.is_replicated for one in groups) else paired


def models_grid(subjects: Sequence[Subject]) -> Grid:
    """A row per model, replicates too: its facts."""
    names = list(dict.fromkeys(name for subject in subjects for name in subject.facts))
    rows = [
        (
            TableCell(subject.name, key=subject.name),
            *(TableCell(text, key=_number(text)) for text in (subject.facts.get(name, "-") for name in names)),
        )
        for subject in subjects
    ]
    return Grid((_MODEL, *map(TableCell, names)), tuple(rows))


def settings_table(subjects: Sequence[Subject]) -> Table | None:
    """The settings of training that differ, beside each other; None if none does."""
    recipes = {subject.name: subject.training.recipe for subject in subjects if subject.training is not None}
    fields = list(dict.fromkeys(name for recipe in recipes.values() for name in recipe))
    differing = [name for name in fields if len({_text(recipe, name) for recipe in recipes.values()}) > 1]
    if len(recipes) < 2 or not differing:
        return None
    rows = [[name, *(_text(recipe, field) for field in differing)] for name, recipe in recipes.items()]
    return Table(title="Settings that differ", columns=("model", *differing), rows=rows)


def _text(recipe: Mapping[str, Any], name: str) -> str:
    if name not in recipe:
        return "-"
    value = recipe[name]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(text: str) -> float | str:
    """What a fact is sorted by: its first number, if it begins with one."""
    first = text.split(" ")[0].replace(",", "").removesuffix("%")
    try:
        return float(first)
    except ValueError:
        return text
