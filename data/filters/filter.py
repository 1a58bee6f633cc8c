"""What a filter is: it looks at a text and hands it on, changed or not, or says why it is left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from base.config import StrictConfig
from data.records import Reason


class Rejection(NamedTuple):
    """Why a document is left out.

    Attributes:
        why: what was found, for people, such as `12 words, at least 50 are asked for`.
    """

    reason: Reason
    why: str


Judge = Callable[[str], str | Rejection]
"""The text to go on with, or why there is none."""


class Filter(StrictConfig, ABC):
    """The settings of a filter that looks at each document by itself."""

    @abstractmethod
    def judge(self) -> Judge:
        """What judges documents, made once per process and slice. Raises DataError: what it needs is not there."""
