"""Fills the templates of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe

from pipelines.stages.report.drawing import Picture
from pipelines.stages.report.samples import fenced
from pipelines.stages.report.svg import inline


def render(template: str, fields: Mapping[str, Any]) -> str:
    """One format of the page. Args: template: its name; fields: what it shows."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.stages.report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["inline"] = _inline
    environment.filters |= {"fenced": fenced, "cell": _markdown_cell}
    return environment.get_template(template).render(fields)


def _inline(picture: Picture, prefix: str = "") -> str:
    return markupsafe.Markup(inline(picture.svg, f"{prefix}{picture.name}", picture.alt))


def _markdown_cell(text: str) -> str:
    """Text that ends no cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
