"""Puts the results of some models on one page, in HTML and in Markdown."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

from pipelines.stages.report import plots
from pipelines.stages.report.plots import Curve

_CONTROL_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "\u2421"}


@dataclass(frozen=True)
class ModelResults:
    """What the page shows of one model. `history` maps a metric to its (step, value) points."""

    name: str
    mixers: str
    num_params: int
    tokens_seen: int
    tokens_per_s: float
    mfu: float | None
    seq_len: int
    loss: float
    perplexity: float
    bits_per_byte: float
    untrained_bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    position_perplexity: Curve
    num_windows: int
    samples: Sequence[tuple[str, str]]  # prompt, continuation
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
            _sample(model, prompt, text, len(models) > 1) for model in models for prompt, text in model.samples
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
        if model.gzip_bits_per_byte is not None:
            references["gzip -9"] = model.gzip_bits_per_byte
        if model.untrained_bits_per_byte is not None:
            references[f"{model.name}, untrained" if len(models) > 1 else "untrained model"] = (
                model.untrained_bits_per_byte
            )
    drawn = [
        _Plot(
            "Compression",
            "Bars of bits per byte",
            "bits_per_byte.png",
            plots.bits_per_byte_plot({model.name: model.bits_per_byte for model in models}, references),
        )
    ]
    if train_loss := curves("train/loss"):
        drawn.append(
            _Plot("Training", "Loss against the step", "loss.png", plots.loss_plot(train_loss, curves("valid/loss")))
        )
    if lr := curves("train/lr"):
        drawn.append(_Plot("Schedule", "Learning rate against the step", "lr.png", plots.learning_rate_plot(lr)))
    by_position = {model.name: model.position_perplexity for model in models if model.position_perplexity}
    if by_position:
        windows = " and ".join(sorted({str(model.num_windows) for model in models if model.num_windows}))
        drawn.append(
            _Plot(
                "Length generalisation",
                "Perplexity against the position in the context",
                "perplexity_by_position.png",
                plots.position_plot(by_position, max(model.seq_len for model in models)),
                f"Mean over {windows} stretches of long validation documents, each begun with an empty memory.",
            )
        )
    return drawn


def _table(models: Sequence[ModelResults]) -> dict[str, Any]:
    columns = ["model", "layers", "parameters", "tokens seen", "loss (nats/token)", "perplexity", "bits per byte",
               "untrained", "gzip -9", "tokens/s", "MFU"]  # fmt: skip
    rows = [
        [
            model.name,
            model.mixers,
            f"{model.num_params / 1e6:.2f} M",
            f"{model.tokens_seen / 1e6:.2f} M",
            f"{model.loss:.4f}",
            f"{model.perplexity:.2f}",
            f"{model.bits_per_byte:.3f}",
            _optional(model.untrained_bits_per_byte, "{:.3f}"),
            _optional(model.gzip_bits_per_byte, "{:.3f}"),
            f"{model.tokens_per_s:,.0f}",
            _optional(model.mfu, "{:.0%}"),
        ]
        for model in models
    ]
    return {"columns": columns, "rows": rows}


def _notes(models: Sequence[ModelResults]) -> list[str]:
    notes = [
        "Loss, perplexity and bits per byte are on the validation split: documents chosen by a hash of their text, "
        "none of which is in the training split. Bits per byte compares models with different tokenizers."
    ]
    if any(model.gzip_bits_per_byte is not None for model in models):
        notes.append(
            "gzip -9 and the untrained model (the same architecture before its first step) are scored on the same text."
        )
    return notes


def _sample(model: ModelResults, prompt: str, text: str, several: bool) -> dict[str, str]:
    prompt, text = _visible(prompt), _visible(text)
    begun = f"Continuing {prompt!r}" if prompt else "A new document"
    whole = prompt + text
    fence = "```"
    while fence in whole:
        fence += "`"
    return {"caption": f"{model.name}: {begun}" if several else begun, "prompt": prompt, "text": text,
            "fenced": f"{fence}text\n{whole}\n{fence}"}  # fmt: skip


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
        "open": stage.kind == "train",
    }


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
