"""Synthetic tasks: what a model must remember, track or compress is known, and so is every answer.

A task is a class with its settings, its documents and its chance level, and an entry below.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from data.tasks.drifting import DriftingRecall
from data.tasks.mad import Compression, FuzzyRecall, InContextRecall, Memorization, NoisyRecall, SelectiveCopying
from data.tasks.mqar import Mqar
from data.tasks.retrieval import Needle, Phonebook
from data.tasks.state_tracking import S5, Parity

AnyTask = Annotated[
    Mqar
    | InContextRecall
    | NoisyRecall
    | FuzzyRecall
    | SelectiveCopying
    | Compression
    | Memorization
    | S5
    | Parity
    | Needle
    | Phonebook
    | DriftingRecall,
    Field(discriminator="kind"),
]
