"""Models that remember, with what a store calls them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from base.errors import UserError
from bmojo import BMojoLM
from bmojo.hf import import_from_hf
from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer
from pipelines.memory.store import ModelIdentity, ModelSource
from pipelines.serving.context import model_digest
from pipelines.stages.models import placed_for_decoding


class Loaded(NamedTuple):
    """A model ready to decode, its tokenizer, and what it is called in a store."""

    model: BMojoLM
    tokenizer: Tokenizer
    identity: ModelIdentity


def identified(model: BMojoLM, tokenizer: Tokenizer, name: str, source: ModelSource) -> Loaded:
    """The model, placed for decoding. Its digest is of the weights as they were stored, before they are cast to what
    this machine computes in, so that a GPU and a CPU agree whose memories a store holds."""
    digest = model_digest(model, tokenizer.sha256)
    identity = ModelIdentity(
        name=name, digest=digest, tokenizer_sha256=tokenizer.sha256, pattern=model.config.pattern, source=source
    )
    return Loaded(placed_for_decoding(model), tokenizer, identity)


def load_exported(folder: Path) -> Loaded:
    """The model in a folder that `bmojo export` wrote. Raises: UserError: there is none, or it cannot be read."""
    try:
        model, tokenizer = import_from_hf(folder).eval(), load_tokenizer(folder)
    except (FileNotFoundError, ValueError, DataError) as error:
        raise UserError(str(error)) from error
    place = folder.resolve()
    return identified(model, tokenizer, place.name, ModelSource(model=str(place)))
