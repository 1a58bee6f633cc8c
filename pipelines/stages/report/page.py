"""Puts sections on one page: what was found, side by side, in HTML, Markdown and JSON, with its plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from base.errors import UserError
from pipelines.stages.report import samples, tables
from pipelines.stages.report.clocks import clocks
from pipelines.stages.report.comparison import Column, compare
from pipelines.stages.report.curves import curve_panels, training_panels
from pipelines.stages.report.dot_plots import draw_differences, draw_values
from pipelines.stages.report.drawing import COLOURS, Picture
from pipelines.stages.report.fit_plots import draw_law
from pipelines.stages.report.identity import RunIdentity
from pipelines.stages.report.line_plots import draw_lines
from pipelines.stages.report.machine import figure_rows, report_json
from pipelines.stages.report.panels import MAX_LINES
from pipelines.stages.report.rendering import render
from pipelines.stages.report.subjects import Group, gather, group
from pipelines.stages.sections import Section, Table

PLOTS = "plots"  # folder
_OPEN_PLOTS = 8  # of the comparison
_ENOUGH_FOR_OPEN = 2  # models whose samples show without a click


@dataclass(frozen=True)
class StageSummary:
    """A stage's resolved configuration, for the end of the page."""

    name: str
    kind: str
    fingerprint: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a page is made of. Args: trained: subjects that are shown even without results; baseline: a subject."""

    title: str
    about: str
    runs: Sequence[RunIdentity]
    sections: Sequence[Section]
    made_by: Table
    stages: Sequence[StageSummary]
    trained: Sequence[str] = ()
    baseline: str = ""


@dataclass(frozen=True)
class Report:
    """The page in three formats, its pictures by file name, and its tables for trackers."""

    html: str
    markdown: str
    json: str
    pictures: Mapping[str, bytes]
    results: tables.Grid
    rows: Sequence[Mapping[str, Any]]  # by machine.COLUMNS
    verdicts: Sequence[str]

    def write(self, folder: Path) -> None:
        """Write report.html, report.md, report.json and the folder plots. Raises OSError."""
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        files = {"report.html": self.html, "report.md": self.markdown, "report.json": self.json}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name, data in self.pictures.items():
            (folder / PLOTS / name).write_bytes(data)


def build_report(content: Content) -> Report:
    """Compare the models, draw the plots and fill the templates.

    Raises: ValueError: there is nothing to report on. UserError: there is no model of the baseline's name.
    """
    subjects = gather(content.sections, content.trained)
    if not any(subject.measured for subject in subjects):
        raise ValueError("a report needs the results of at least one model.")
    groups = group(subjects)
    baseline = find_baseline(groups, content.baseline)
    columns = compare(groups, baseline)
    main = [column for column in columns if column.figure.is_main] or columns[:1]
    judged = [column for column in main if column.figure.transform == "identity"] or main  # others say the same
    ranking = _ranking(main, groups, baseline)
    short_labels = {one.name: one.short_label for one in groups}
    colours = dict(zip(ranking, COLOURS[:MAX_LINES], strict=False))

    compared = _comparison(judged, short_labels, baseline) if len(groups) > 1 else []
    curves = [draw_lines(panel, colours) for panel in curve_panels(groups, ranking)]
    training = _training(groups, ranking, colours)
    fitted = [law for section in content.sections for law in section.laws]
    laws = [draw_law(law) for law in fitted]
    results = tables.results_grid(main, groups, baseline)
    verdicts = tables.verdicts(judged, groups)
    rows = figure_rows(columns, groups, baseline)
    settings = tables.settings_table([one.members[0] for one in groups])
    fields: dict[str, Any] = {
        "title": content.title,
        "about": content.about,
        "runs": content.runs,
        "results": results,
        "verdicts": verdicts,
        "how": tables.how_to_read(main, groups, baseline),
        "notes": _once(
            note for one in subjects for measured in one.measured.values() for note in measured.result.notes
        ),
        "measures": tables.measure_grids(columns, groups, baseline),
        "compared": compared,
        "num_open": _OPEN_PLOTS,
        "laws": laws,
        "law_tables": [law.table for law in fitted],
        "curves": curves,
        "training": training,
        "models": tables.models_grid(subjects),
        "settings": settings,
        "prompts": samples.prompts(subjects),
        "open_samples": len(subjects) <= _ENOUGH_FOR_OPEN,
        "data": _once_by_title(table for section in content.sections for table in section.data),
        "made_by": content.made_by,
        "stages": [_stage(stage) for stage in content.stages],
    }
    pictures = [*compared, *laws, *curves, *(training[0].pictures if training else ())]
    return Report(
        html=render("report.html.j2", fields),
        markdown=render("report.md.j2", fields),
        json=report_json(
            title=content.title,
            runs=content.runs,
            baseline=baseline,
            rows=rows,
            verdicts=verdicts,
            subjects=subjects,
            tables=[*fields["law_tables"], *fields["data"], content.made_by],
        ),
        pictures={
            f"{picture.name}.{suffix}": data
            for picture in pictures
            for suffix, data in (("svg", picture.svg.encode()), ("png", picture.png))
        },
        results=results,
        rows=rows,
        verdicts=verdicts,
    )


def find_baseline(groups: Sequence[Group], wanted: str) -> str:
    """The group that is, or has, the model of this name; the first one by default.

    Raises: UserError: there is none; names those that there are.
    """
    if not wanted:
        return groups[0].name
    for one in groups:
        if wanted == one.name or wanted in (member.name for member in one.members):
            return one.name
    raise UserError(
        f"There is no model {wanted!r} to be the baseline. Models: {', '.join(one.name for one in groups)}."
    )


@dataclass(frozen=True)
class ClockedPictures:
    """The curves of training over one x axis."""

    name: str
    x_label: str
    pictures: Sequence[Picture]


def _training(groups: Sequence[Group], ranking: Sequence[str], colours: Mapping[str, str]) -> list[ClockedPictures]:
    trainings = [member.training for one in groups for member in one.members if member.training is not None]
    found = []
    for number, clock in enumerate(clocks(trainings)):
        panels = training_panels(groups, clock, ranking)
        pictures = [draw_lines(panel, colours, with_png=number == 0) for panel in panels]
        if pictures:
            found.append(ClockedPictures(clock.name, clock.x_label, pictures))
    return found


def _comparison(columns: Sequence[Column], labels: Mapping[str, str], baseline: str) -> list[Picture]:
    pictures = []
    for column in columns:
        if len(column.ranked()) > 1:
            pictures.append(draw_values(column, labels, baseline))
            difference = draw_differences(column, labels, baseline)
            pictures += [] if difference is None else [difference]
    return pictures


def _ranking(main: Sequence[Column], groups: Sequence[Group], baseline: str) -> list[str]:
    """Groups in the order in which plots keep them: the best by the first figure, but the baseline always."""
    ranked = main[0].ranked() if main else []
    names = [*ranked, *(one.name for one in groups if one.name not in ranked)]
    if names.index(baseline) >= MAX_LINES:
        names.remove(baseline)
        names.insert(MAX_LINES - 1, baseline)
    return names


def _once(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def _once_by_title(data: Iterable[Table]) -> list[Table]:
    return list({(table.title, str(table.rows)): table for table in data}.values())


def _stage(stage: StageSummary) -> dict[str, Any]:
    text = yaml.safe_dump(dict(stage.config), sort_keys=False, allow_unicode=True, width=100).rstrip()
    return {"name": stage.name, "kind": stage.kind, "fingerprint": stage.fingerprint[:8], "yaml": text}
