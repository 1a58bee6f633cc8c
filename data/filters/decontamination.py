"""Documents that hold text of evaluation sets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from pydantic import Field

from data.config import FilesSource
from data.errors import DataError
from data.filters.filter import Filter, Judge, Rejection
from data.id_sources import Paths
from data.sources import Document, plan_slices, read_slice

_WORD = re.compile(r"\w+")


class Decontamination(Filter):
    """Leave out documents with a run of words of an evaluation set (13 words: GPT-3, arXiv:2005.14165, appendix C).

    Upper and lower case are one, and all but letters and digits only keeps words apart.
    """

    kind: Literal["decontamination"]
    paths: Paths = Field(description="Files with the texts of evaluation sets, in the formats of a source of files.")
    text_field: str = Field("text", min_length=1, description="Field or column that holds the text.")
    ngram_words: int = Field(
        13, ge=1, description="Words in a run. Texts of an evaluation set that are shorter are not looked for."
    )

    @property
    def source(self) -> FilesSource:
        """The texts of the evaluation sets."""
        return FilesSource(kind="files", paths=self.paths, text_field=self.text_field)

    def judge(self) -> Judge:
        """Look every run of words up. Raises DataError: a file cannot be read, or none holds a run that long."""
        known = _runs_of_files(self)

        def judge(text: str) -> str | Rejection:
            found = next((run for run in _runs(text, self.ngram_words) if run in known), None)
            return text if found is None else Rejection("contaminated", f"it holds {found!r}")

        return judge


@lru_cache(maxsize=4)  # a worker process does many slices
def _runs_of_files(config: Decontamination) -> frozenset[str]:
    slices = plan_slices(config.source, 64 << 20)
    documents = (document for slice_ in slices for document in read_slice(slice_) if isinstance(document, Document))
    runs = frozenset(run for document in documents for run in _runs(document.text, config.ngram_words))
    if not runs:
        raise DataError(
            f"filters: decontamination: no text in {', '.join(config.paths)} has {config.ngram_words} words. Name "
            "other files, or lower ngram_words."
        )
    return runs


def _runs(text: str, length: int) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
