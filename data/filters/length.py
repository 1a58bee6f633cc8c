"""Documents that are too short or too long."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from data.filters.filter import Filter, Judge, Rejection


class Length(Filter):
    """Leave out documents that are shorter or longer."""

    kind: Literal["length"]
    min_characters: int = Field(1, ge=0, description="Least number of characters.")
    max_characters: int | None = Field(None, ge=1, description="Greatest number of characters; null: any.")
    min_words: int = Field(0, ge=0, description="Least number of words, which white space keeps apart.")
    max_words: int | None = Field(None, ge=1, description="Greatest number of words; null: any.")

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        for unit in ("characters", "words"):
            least, greatest = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if greatest is not None and least > greatest:
                raise ValueError(f"min_{unit}={least} is more than max_{unit}={greatest}; lower it.")
        return self

    def judge(self) -> Judge:
        """Count characters, and words if they matter."""

        def judge(text: str) -> str | Rejection:
            rejection = _outside(len(text), self.min_characters, self.max_characters, "characters")
            if rejection is None and (self.min_words or self.max_words is not None):
                rejection = _outside(len(text.split()), self.min_words, self.max_words, "words")
            return rejection or text

        return judge


def _outside(found: int, least: int, greatest: int | None, unit: str) -> Rejection | None:
    if found < least:
        return Rejection("too_short", f"{found:,} {unit}, at least {least:,} are asked for")
    if greatest is not None and found > greatest:
        return Rejection("too_long", f"{found:,} {unit}, at most {greatest:,} are allowed")
    return None
