"""A plot's SVG as a part of an HTML page: in the page's colours and letters, its ids apart from those of others."""

from __future__ import annotations

import html
import re

from pipelines.stages.report.drawing import COLOURS, GRID, INK, MUTED, PAPER

_VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "none",
    **{colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)},
}
_COLOUR = re.compile("|".join(_VARIABLES))
_ID = re.compile(r' id="([^"]+)"')
_USE = re.compile(r'(url\(#|xlink:href="#)([^")]+)')


def inline(svg: str, name: str, alt: str) -> str:
    """The <svg> element. Args: name: unlike that of any other plot of the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    used = {found[2] for found in _USE.finditer(body)}
    body = _ID.sub(lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = _USE.sub(lambda found: f"{found[1]}{name}-{found[2]}", body)
    body = _COLOUR.sub(lambda found: _VARIABLES[found[0]], body)
    opening, rest = body.split(">", 1)
    view_box = re.search(r'viewBox="[^"]+"', opening)
    assert view_box is not None, "matplotlib writes one"
    label = html.escape(alt, quote=True)
    head = f'<svg {view_box[0]} role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"\n\s*", "\n", f"{head}>{rest}").strip()
