"""The inspection as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from bmojo.config import ModelConfig
from bmojo.inspection import MEMORIES, LayerInspection, RuleInspection
from bmojo.mixers.selection import RULES
from pipelines.inspection import plots
from pipelines.inspection.text import shown_at

NUM_SHADES = 8
NUM_FIRST = 5  # tokens of a rule that are named


@dataclass(frozen=True)
class Subject:
    """What is being looked at."""

    title: str
    about: str
    config: ModelConfig
    pieces: Sequence[str]  # of text, one per token
    note: str = ""  # where the text was cut


def inspection_html(subject: Subject, layers: Sequence[LayerInspection]) -> str:
    """Fill the template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.inspection"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    config = subject.config
    return environment.get_template("inspection.html.j2").render(
        title=subject.title,
        about=subject.about,
        note=subject.note,
        window_size=config.window_size,
        chunk_size=config.chunk_size,
        num_eidetic=_slots(config),
        selection=config.selection,
        rule=RULES[config.selection].DESCRIPTION,
        num_tokens=len(subject.pieces),
        shades=[_shade(index) for index in range(NUM_SHADES)],
        memories=list(zip(MEMORIES, plots.MEMORY_COLOURS, strict=True)),
        kept_colour=plots.KEPT_COLOUR,
        mass_png=_base64(plots.mass_png(layers)),
        layers=[_layer(layer, subject) for layer in layers],
    )


def _layer(layer: LayerInspection, subject: Subject) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "number": layer.layer,
        "mixer": layer.mixer,
        "mass": [f"{share:.0%} {memory}" for share, memory in zip(layer.mean_mass, MEMORIES, strict=True)],
        "spans": None,
        "rules": [],
    }
    if layer.innovation_t is None:
        return shown
    return shown | {
        "spans": _spans(layer, subject),
        "scores_png": _base64(plots.scores_png(layer, subject.config.window_size)),
        "num_kept": len(layer.kept_at_end),
        "num_ever": len(layer.kept),
        "rules": [_rule(rule, layer, subject) for rule in layer.rules],
        "rules_png": _base64(plots.rules_png(layer, subject.config.window_size)),
    }


def _rule(rule: RuleInspection, layer: LayerInspection, subject: Subject) -> dict[str, Any]:
    """A row of the table: what it keeps, and how many of these tokens each rule keeps too."""
    places = shown_at(subject.pieces)
    first_pieces = [subject.pieces[place] for place in dict.fromkeys(places[i] for i in rule.positions)][:NUM_FIRST]
    return {
        "name": rule.label,
        "description": RULES[rule.rule].DESCRIPTION,
        "num_kept": len(rule.positions),
        "shared": [rule.shared_with(other) for other in layer.rules],
        "first": [piece.replace("\n", "↵").replace(" ", "␣") for piece in first_pieces],
    }


def _slots(config: ModelConfig) -> str:
    """In words, for a sentence."""
    if isinstance(config.num_eidetic, int):
        return str(config.num_eidetic)
    return f"{', '.join(map(str, config.num_eidetic))} (by layer)"


def _spans(layer: LayerInspection, subject: Subject) -> list[dict[str, str]]:
    assert layer.innovation_t is not None
    rank = plots.ranks(layer.innovation_t).tolist()
    kept = {token.position: token for token in layer.kept}
    first_in_window = len(subject.pieces) - subject.config.window_size
    scores = layer.innovation_t.tolist()
    parts: dict[int, list[int]] = {}  # tokens by the one at which they show
    for part, place in enumerate(shown_at(subject.pieces)):
        parts.setdefault(place, []).append(part)
    spans = []
    for place, tokens in parts.items():
        piece = subject.pieces[place]
        # Of a character's tokens the one that is kept longest, or else the most surprising one, stands for all.
        position = max(tokens, key=lambda part: (part in kept, part in kept and kept[part].dropped is None, rank[part]))
        classes = [f"s{min(NUM_SHADES - 1, int(rank[position] * NUM_SHADES))}"]
        tip = f"token {position}, score {scores[position]:.3g}, more than {rank[position]:.0%} of the tokens"
        if len(tokens) > 1:
            tip += f"; the character is tokens {tokens[0]} to {tokens[-1]}"
        token = kept.get(position)
        if token is not None and token.dropped is None:
            classes.append("kept")
            tip += f"; kept since token {token.entered}"
        elif token is not None:
            classes.append("dropped")
            tip += f"; kept from token {token.entered} to {token.dropped}"
        elif position >= first_in_window:
            classes.append("near")
            tip += "; in the window at the end"
        spans.append({"classes": " ".join(classes), "tip": tip, "text": piece.replace("\n", "↵\n")})
    return spans


def _shade(index: int) -> str:
    """From white to orange, as in the plots: darker only where surprise is high."""
    weight = (index / (NUM_SHADES - 1)) ** 2
    return f"rgb(255,{round(255 * (1 - 0.35 * weight))},{round(255 * (1 - 0.75 * weight))})"


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
