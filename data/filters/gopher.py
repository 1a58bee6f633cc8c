"""Rules of thumb for text worth learning from, those of MassiveText (Gopher, arXiv:2112.11446, appendix A.1).

Words are what white space keeps apart, lines and paragraphs what one line end and two keep apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data.filters.filter import Filter, Judge, Rejection
from data.filters.mixing import mixed

if TYPE_CHECKING:
    import numpy as np

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "-", "*", "‣", "●", "◦")
_ELLIPSES = ("...", "…")


class GopherQuality(Filter):
    """Quality rules (appendix A.1.1, "Quality Filtering")."""

    kind: Literal["gopher_quality"]
    min_words: int = Field(50, ge=0, description="Least number of words.")
    max_words: int = Field(100_000, ge=1, description="Greatest number of words.")
    min_mean_word_length: float = Field(3, ge=0, description="Least mean length of a word, in characters.")
    max_mean_word_length: float = Field(10, gt=0, description="Greatest mean length of a word, in characters.")
    max_symbols_per_word: float = Field(0.1, ge=0, description="Most `#`, and most ellipses, per word.")
    max_bullet_lines: float = Field(0.9, ge=0, le=1, description="Greatest share of lines that begin with a bullet.")
    max_ellipsis_lines: float = Field(0.3, ge=0, le=1, description="Greatest share of lines that end with an ellipsis.")
    min_words_with_letters: float = Field(0.8, ge=0, le=1, description="Least share of words that hold a letter.")
    min_stop_words: int = Field(
        2, ge=0, le=8, description="Least number of `the be to of and that have with` that occur; 0 if not English."
    )

    def judge(self) -> Judge:
        """Apply the rules in the order of the fields."""

        def judge(text: str) -> str | Rejection:
            why = next(self._broken(text), None)
            return text if why is None else Rejection("low_quality", why)

        return judge

    def _broken(self, text: str) -> Iterator[str]:
        words = text.split()
        num_words = len(words)
        if not self.min_words <= num_words <= self.max_words:
            yield f"{num_words:,} words, {self.min_words:,} to {self.max_words:,} are asked for"
        if not words:
            return
        mean = sum(map(len, words)) / num_words
        if not self.min_mean_word_length <= mean <= self.max_mean_word_length:
            yield f"words of {mean:.1f} characters on average"
        for name, found in (("#", text.count("#")), ("ellipses", sum(map(text.count, _ELLIPSES)))):
            if found > self.max_symbols_per_word * num_words:
                yield f"{found / num_words:.2f} {name} per word"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for name, found, greatest in (
            ("begin with a bullet", sum(line.startswith(_BULLETS) for line in lines), self.max_bullet_lines),
            ("end with an ellipsis", sum(line.endswith(_ELLIPSES) for line in lines), self.max_ellipsis_lines),
        ):
            if found > greatest * len(lines):
                yield f"{found / len(lines):.0%} of the lines {name}"
        with_letters = sum(any(map(str.isalpha, word)) for word in words)
        if with_letters < self.min_words_with_letters * num_words:
            yield f"{with_letters / num_words:.0%} of the words hold a letter"
        if self.min_stop_words:
            found_stop_words = _STOP_WORDS.intersection(map(str.lower, words))
            if len(found_stop_words) < self.min_stop_words:
                yield f"{len(found_stop_words)} of the words {' '.join(sorted(_STOP_WORDS))} occur"


class GopherRepetition(Filter):
    """Repetition rules (appendix A.1.1, "Repetition Removal", table A1)."""

    kind: Literal["gopher_repetition"]
    max_duplicate_lines: float = Field(0.3, ge=0, le=1, description="Greatest share of lines that occurred before.")
    max_duplicate_paragraphs: float = Field(0.3, ge=0, le=1, description="The same of paragraphs.")
    max_duplicate_line_characters: float = Field(
        0.2, ge=0, le=1, description="Greatest share of the characters that are in lines that occurred before."
    )
    max_duplicate_paragraph_characters: float = Field(0.2, ge=0, le=1, description="The same of paragraphs.")
    max_top_ngrams: tuple[float, ...] = Field(
        (0.20, 0.18, 0.16),
        max_length=10,
        description="Greatest share of the characters in the most frequent run of 2, 3, ... words.",
    )
    max_duplicate_ngrams: tuple[float, ...] = Field(
        (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
        max_length=10,
        description="Greatest share of the characters in runs of 5, 6, ... words that occur more than once.",
    )

    def judge(self) -> Judge:
        """Apply the rules in the order of the fields."""

        def judge(text: str) -> str | Rejection:
            why = next(self._broken(text), None)
            return text if why is None else Rejection("repetitive", why)

        return judge

    def _broken(self, text: str) -> Iterator[str]:
        lines = _pieces(text, "\n")
        paragraphs = _pieces(text, "\n\n")
        num_characters = max(len(text), 1)
        for name, pieces, greatest in (
            ("lines", lines, self.max_duplicate_lines),
            ("paragraphs", paragraphs, self.max_duplicate_paragraphs),
        ):
            if pieces and (share := 1 - len(set(pieces)) / len(pieces)) > greatest:
                yield f"{share:.0%} of the {name} occurred before"
        for name, pieces, greatest in (
            ("lines", lines, self.max_duplicate_line_characters),
            ("paragraphs", paragraphs, self.max_duplicate_paragraph_characters),
        ):
            if (share := sum(map(len, _repeated(pieces))) / num_characters) > greatest:
                yield f"{share:.0%} of the characters are in {name} that occurred before"
        runs = _Runs(text.split())
        for length, greatest in enumerate(self.max_top_ngrams, start=2):
            if (share := runs.most_frequent(length) / num_characters) > greatest:
                yield f"{share:.0%} of the characters are in one run of {length} words"
        for length, greatest in enumerate(self.max_duplicate_ngrams, start=5):
            if (share := runs.repeated(length) / num_characters) > greatest:
                yield f"{share:.0%} of the characters are in repeated runs of {length} words"


def _pieces(text: str, between: str) -> list[str]:
    return [piece.strip() for piece in text.split(between) if piece.strip()]


def _repeated(pieces: Sequence[str]) -> list[str]:
    """Those that occurred before."""
    seen: set[str] = set()
    repeated: list[str] = []
    for piece in pieces:
        if piece in seen:
            repeated.append(piece)
        seen.add(piece)
    return repeated


class _Runs:
    """Runs of words of a text, told apart by hashes of 64 bits. Sizes count the characters of words."""

    def __init__(self, words: Sequence[str]) -> None:
        import numpy as np

        numbers: dict[str, int] = {}
        self._words = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.uint64)
        self._ends = np.cumsum([0, *map(len, words)])
        self._hashes = mixed(self._words)  # of runs of
        self._length = 1  # word; grows

    def most_frequent(self, length: int) -> int:
        """Size of the most frequent run, the first of several, all times it occurs; 0 if none occurs twice."""
        import numpy as np

        hashes = self._of(length)
        if not len(hashes):
            return 0
        _, firsts, counts = np.unique(hashes, return_index=True, return_counts=True)
        count = counts.max()
        first = firsts[counts == count].min()
        return int(count * (self._ends[first + length] - self._ends[first])) if count > 1 else 0

    def repeated(self, length: int) -> int:
        """Size of the words that are in a run that occurs more than once; each word counts once."""
        import numpy as np

        hashes = self._of(length)
        _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        starts = np.flatnonzero(counts[which] > 1) if len(hashes) else np.empty(0, np.int64)
        begun = np.zeros(len(self._words) + 1, np.int64)
        np.add.at(begun, starts, 1)
        np.add.at(begun, starts + length, -1)
        return int(np.diff(self._ends)[begun.cumsum()[:-1] > 0].sum())

    def _of(self, length: int) -> np.ndarray:
        """A hash of the run of words from each word on; lengths are asked for in increasing order, or again from 2."""
        if length < self._length:
            self._hashes, self._length = mixed(self._words), 1
        while self._length < length:
            self._hashes = mixed(self._hashes[:-1] ^ self._words[self._length :])
            self._length += 1
        return self._hashes
