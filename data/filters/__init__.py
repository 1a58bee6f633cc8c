"""Filters of documents, each optional: the order of the list is that in which they look at a document.

A filter is a class with its settings, and an entry in AnyFilter. `screened` applies them all.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from base.config import StrictConfig
from data.filters.decontamination import Decontamination
from data.filters.duplicates import ExactDuplicates, NearDuplicates
from data.filters.gopher import GopherQuality, GopherRepetition
from data.filters.language import Language
from data.filters.length import Length
from data.filters.python import Python
from data.filters.unicode import Unicode

AnyFilter = Annotated[
    Unicode
    | Length
    | GopherQuality
    | GopherRepetition
    | Language
    | Decontamination
    | ExactDuplicates
    | NearDuplicates
    | Python,
    Field(discriminator="kind"),
]


class FilterFields(StrictConfig):
    """Which documents of a source of text stay."""

    filters: tuple[AnyFilter, ...] = Field(
        (),
        description="What leaves documents out or changes them, in this order. Those left out are counted by reason. "
        "Each filter that compares documents, for duplicates, reads the source once more.",
    )
