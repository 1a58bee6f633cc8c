"""Puts the sections of some stages on one page, in HTML and in Markdown."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

from pipelines.stages.report import plots
from pipelines.stages.sections import Passage, Plot, Section

_CONTROL_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "\u2421"}


@dataclass(frozen=True)
class StageSummary:
    """A stage's resolved configuration, for the end of the page. `is_open`: shown without a click."""

    name: str
    kind: str
    fingerprint: str
    config: Mapping[str, Any]
    is_open: bool = False


@dataclass(frozen=True)
class Report:
    """The page in two formats and its pictures, by file name."""

    html: str
    markdown: str
    pictures: Mapping[str, bytes]


def build_report(title: str, about: str, sections: Sequence[Section], stages: Sequence[StageSummary]) -> Report:
    """Draw the plots and fill the templates.

    Raises: ValueError: there is nothing to report on.
    """
    if not any(section.cells for section in sections):
        raise ValueError("a report needs the results of at least one model.")
    subjects = list(dict.fromkeys(section.subject for section in sections))
    drawn = _draw(sections, subjects)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.stages.report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = {
        "title": title,
        "about": about,
        "table": _table(sections),
        "notes": _once(note for section in sections for note in section.notes),
        "data": _once(line for section in sections for line in section.data),
        "plots": [plot.for_template() for plot in drawn],
        "samples": [
            _sample(section.subject if len(subjects) > 1 else None, passage)
            for section in sections
            for passage in section.passages
        ],
        "stages": [_stage(stage) for stage in stages],
    }
    return Report(
        html=environment.get_template("report.html.j2").render(content),
        markdown=environment.get_template("report.md.j2").render(content),
        pictures={plot.file: plot.png for plot in drawn},
    )


@dataclass(frozen=True)
class _Picture:
    plot: Plot
    png: bytes
    note: str

    @property
    def file(self) -> str:
        return self.plot.file

    def for_template(self) -> dict[str, str]:
        return {
            "heading": self.plot.heading,
            "alt": self.plot.alt,
            "file": self.file,
            "note": self.note,
            "png_base64": base64.b64encode(self.png).decode(),
        }


def _draw(sections: Sequence[Section], subjects: list[str]) -> list[_Picture]:
    """One picture per file, in the order in which the sections name them."""
    colours = plots.colours_of(subjects)
    shares: dict[str, dict[str, Plot]] = {}
    for section in sections:
        for plot in section.plots:
            shares.setdefault(plot.file, {})[section.subject] = plot
    return [
        _Picture(
            next(iter(of_file.values())),
            plots.draw(of_file, colours),
            " ".join(_once(plot.note for plot in of_file.values())),
        )
        for of_file in shares.values()
    ]


def _table(sections: Sequence[Section]) -> dict[str, Any]:
    """A row per subject; two where it has two values in a column."""
    rows: list[tuple[str, dict[str, str]]] = []
    for section in sections:
        if section.cells:
            fitting = (cells for subject, cells in rows if subject == section.subject)
            row = next((cells for cells in fitting if not cells.keys() & section.cells.keys()), None)
            if row is None:
                rows.append((section.subject, row := {}))
            row.update(section.cells)
    columns = _once(column for _, cells in rows for column in cells)
    return {
        "columns": ["model", *columns],
        "rows": [[subject, *(cells.get(column, "-") for column in columns)] for subject, cells in rows],
    }


def _once(texts: Iterable[str]) -> list[str]:
    """Each text that is not empty, once."""
    return [text for text in dict.fromkeys(texts) if text]


def _sample(model: str | None, sample: Passage) -> dict[str, str]:
    prompt, text = _visible(sample.prompt), _visible(sample.text)
    begun = f"Continuing {prompt!r}" if prompt else "A new document"
    whole = prompt + text
    fence = "```"
    while fence in whole:
        fence += "`"
    return {
        "caption": f"{model}: {begun}" if model else begun,
        "prompt": prompt,
        "text": text,
        "fenced": f"{fence}text\n{whole}\n{fence}",
    }


def _visible(text: str) -> str:
    """Control characters, which HTML and terminals do not show, as the pictures Unicode has for them."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else _CONTROL_PICTURES.get(char, "\ufffd")
        for char in text
    )


def _stage(stage: StageSummary) -> dict[str, Any]:
    text = yaml.safe_dump(dict(stage.config), sort_keys=False, allow_unicode=True, width=100).rstrip()
    return {
        "name": stage.name,
        "kind": stage.kind,
        "fingerprint": stage.fingerprint[:8],
        "yaml": text,
        "open": stage.is_open,
    }
