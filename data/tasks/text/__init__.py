"""Recall tasks written in words, for models of text: what is asked stands in the prompt, and so does the answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from data.tasks.text.extraction import Extraction
from data.tasks.text.needle import TextNeedle
from data.tasks.text.phonebook import TextPhonebook

AnyTextTask = Annotated[TextNeedle | TextPhonebook | Extraction, Field(discriminator="kind")]
