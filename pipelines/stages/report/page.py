"""Puts the results of some models on one page, in HTML and in Markdown."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

from pipelines.stages.evaluate.stage import EvaluateOutput, SampleText
from pipelines.stages.report import plots
from pipelines.stages.report.plots import Curve
from pipelines.stages.train.stage import TrainOutput, TrainStage

_LAST_COLUMNS = ("tokens/s", "MFU")
_CONTROL_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "\u2421"}


@dataclass(frozen=True)
class ModelResults:
    """Results of one model."""

    name: str
    pattern: str
    training: TrainOutput
    evaluation: EvaluateOutput
    history: Mapping[str, Curve]


@dataclass(frozen=True)
class StageSummary:
    """A stage's resolved configuration, for the end of the page."""

    name: str
    kind: str
    fingerprint: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """The page in two formats and its pictures, by file name."""

    html: str
    markdown: str
    pictures: Mapping[str, bytes]


def build_report(
    title: str, about: str, models: Sequence[ModelResults], stages: Sequence[StageSummary], data: Sequence[str] = ()
) -> Report:
    """Draw the plots and fill the templates.

    Args: data: lines about the data that the models were trained on.
    Raises: ValueError: there is no model to report on.
    """
    if not models:
        raise ValueError("a report needs the results of at least one model.")
    drawn = _draw(models)
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
        "table": _table(models),
        "notes": _notes(models),
        "data": data,
        "plots": [plot.for_template() for plot in drawn],
        "samples": [
            _sample(model.name if len(models) > 1 else None, sample)
            for model in models
            for sample in model.evaluation.samples
        ],
        "stages": [_stage(stage) for stage in stages],
    }
    return Report(
        html=environment.get_template("report.html.j2").render(content),
        markdown=environment.get_template("report.md.j2").render(content),
        pictures={plot.file: plot.png for plot in drawn},
    )


@dataclass(frozen=True)
class _Plot:
    heading: str
    alt: str
    file: str
    png: bytes
    note: str = ""

    def for_template(self) -> dict[str, str]:
        return {
            "heading": self.heading,
            "alt": self.alt,
            "file": self.file,
            "note": self.note,
            "png_base64": base64.b64encode(self.png).decode(),
        }


def _draw(models: Sequence[ModelResults]) -> list[_Plot]:
    def curves(metric: str) -> dict[str, Curve]:
        return {model.name: model.history[metric] for model in models if model.history.get(metric)}

    references: dict[str, float] = {}
    for model in models:
        if model.evaluation.gzip_bits_per_byte is not None:
            references["gzip -9"] = model.evaluation.gzip_bits_per_byte
        if model.evaluation.untrained_bits_per_byte is not None:
            label = f"{model.name}, untrained" if len(models) > 1 else "untrained model"
            references[label] = model.evaluation.untrained_bits_per_byte
    drawn = [
        _Plot(
            "Compression",
            "Bars of bits per byte",
            "bits_per_byte.png",
            plots.bits_per_byte_plot({model.name: model.evaluation.bits_per_byte for model in models}, references),
        )
    ]
    if train_loss := curves("train/loss"):
        drawn.append(
            _Plot("Training", "Loss against the step", "loss.png", plots.loss_plot(train_loss, curves("valid/loss")))
        )
    if lr := curves("train/lr"):
        drawn.append(_Plot("Schedule", "Learning rate against the step", "lr.png", plots.learning_rate_plot(lr)))
    by_position = {model.name: curve for model in models if (curve := model.evaluation.position_perplexity)}
    if by_position:
        windows = {str(model.evaluation.num_windows) for model in models if model.evaluation.num_windows}
        drawn.append(
            _Plot(
                "Length generalisation",
                "Perplexity against the position in the context",
                "perplexity_by_position.png",
                plots.position_plot(by_position, max(model.evaluation.seq_len for model in models)),
                f"Mean over {' and '.join(sorted(windows))} stretches of long validation documents, each started with "
                "an empty memory.",
            )
        )
    return drawn


def _table(models: Sequence[ModelResults]) -> dict[str, Any]:
    rows = []
    for model in models:
        cells = {"model": model.name, "layers": model.pattern}
        cells |= model.training.report_cells() | model.evaluation.report_cells()
        speed = {column: cells.pop(column) for column in _LAST_COLUMNS}
        rows.append(cells | speed)
    return {"columns": list(rows[0]), "rows": [list(cells.values()) for cells in rows]}


def _notes(models: Sequence[ModelResults]) -> list[str]:
    notes = [
        "Loss, perplexity and bits per byte are on the validation split: documents chosen by a hash of their text, "
        "none of which is in the training split. Bits per byte compares models with different tokenizers."
    ]
    if any(model.evaluation.gzip_bits_per_byte is not None for model in models):
        notes.append(
            "gzip -9 and the untrained model (the same architecture before its first step) are scored on the same text."
        )
    return notes


def _sample(model: str | None, sample: SampleText) -> dict[str, str]:
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
        "open": stage.kind == TrainStage.kind,
    }
