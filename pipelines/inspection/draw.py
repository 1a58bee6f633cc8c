"""From a model and a text to the page and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from base.errors import UserError
from bmojo import BMojoLM
from bmojo.inspection import MEMORIES, LayerInspection, inspect_memory
from data.tokenizer import Tokenizer
from pipelines.inspection.page import Subject, inspection_html
from pipelines.inspection.plots import overview_png
from pipelines.inspection.text import shown_at, token_pieces


@dataclass(frozen=True)
class DrawnInspection:
    """The inspection, drawn."""

    html: str
    png: bytes
    summary: tuple[str, ...]  # one line per layer


def draw_inspection(
    model: BMojoLM,
    tokenizer: Tokenizer,
    text: str,
    max_tokens: int,
    title: str,
    about: str,
    threshold: float | None = None,
) -> DrawnInspection:
    """Let the model read a text as a document of its own, and draw what its layers kept.

    Args: threshold: see inspect_memory.
    Raises: UserError: the model has no memory to look at, or the text never leaves the window.
    """
    ids = [tokenizer.eod_id, *tokenizer.encode_batch([text])[0].tolist()]
    note = ""
    if len(ids) > max_tokens:
        note = f"Only the first {max_tokens} of {len(ids)} tokens are shown (--max-tokens)."
        ids = ids[:max_tokens]
    device = next(model.parameters()).device
    try:
        layers = inspect_memory(model, torch.tensor(ids, device=device), threshold)
    except ValueError as error:
        raise UserError(f"Cannot inspect: {error}") from error
    pieces = token_pieces(tokenizer, ids)
    subject = Subject(title, about, model.config, pieces, note)
    png = overview_png(layers, pieces, model.config.window_size)
    return DrawnInspection(inspection_html(subject, layers), png, tuple(_summary(layer, pieces) for layer in layers))


def _summary(layer: LayerInspection, pieces: Sequence[str]) -> str:
    mass = ", ".join(f"{memory} {share:.0%}" for memory, share in zip(MEMORIES, layer.mean_mass, strict=True))
    line = f"layer {layer.layer} ({layer.mixer}): attention {mass}"
    if layer.innovation_t is None:
        return line
    score, places = layer.innovation_t, shown_at(pieces)
    best = sorted(layer.kept_at_end, key=lambda token: -float(score[token.position]))[:5]
    named = ", ".join(repr(pieces[place]) for place in dict.fromkeys(places[token.position] for token in best))
    return f"{line}; keeps {len(layer.kept_at_end)} tokens{f', first of all {named}' if named else ''}"
