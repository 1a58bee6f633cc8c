"""How many near duplicates are found, and how many of those found are none: `python -m benchmarks.near_duplicates`.

Documents are stretches of equal length of the texts. What the filter finds among them already is taken out first. Then
copies of some are planted at random places, a share of their words replaced, left out or doubled in equal parts.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.config import FilesSource
from data.filters.duplicates import NearDuplicates
from data.filters.screening import screened
from data.sources import Document, plan_slices, read_slice

SETTINGS = ({}, {"threshold": 0.6}, {"threshold": 0.7}, {"shingle_words": 3}, {"shingle_words": 3, "threshold": 0.7})
SLICE_BYTES = 8 << 20


class Figures(NamedTuple):
    """Documents planted; left out; and of these planted ones, or what they were copied from."""

    num_planted: int
    num_left_out: int
    num_right: int

    @property
    def recall(self) -> float:
        """Share of the planted documents that are found."""
        return self.num_right / self.num_planted

    @property
    def precision(self) -> float:
        """Share of what is left out that should be."""
        return self.num_right / max(self.num_left_out, 1)


def stretches(paths: Sequence[str], num_words: int) -> Iterator[str]:
    """Stretches of the texts, of equal length."""
    source = FilesSource(kind="files", paths=tuple(paths))
    for slice_ in plan_slices(source, SLICE_BYTES):
        for document in read_slice(slice_):
            assert isinstance(document, Document)
            words = document.text.split()
            for start in range(0, len(words) - num_words + 1, num_words):
                yield " ".join(words[start : start + num_words])


def edited(text: str, share: float, rng: random.Random, known: Sequence[str]) -> str:
    """The text with a share of its words replaced by words of another one, left out or doubled."""
    words = text.split()
    for place in sorted(rng.sample(range(len(words)), round(share * len(words))), reverse=True):
        words[place : place + 1] = rng.choice(([rng.choice(known)], [], [words[place]] * 2))
    return " ".join(words)


def left_out(texts: Sequence[str], filter_: NearDuplicates) -> set[int]:
    """Numbers of the texts that the filter leaves out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        slices = plan_slices(FilesSource(kind="files", paths=(str(path),)), SLICE_BYTES)
        return {number for number, verdict in enumerate(screened(slices, (filter_,))) if verdict.rejection}


def measure(texts: Sequence[str], filter_: NearDuplicates, planted: float, share: float, seed: int) -> Figures:
    """Plant copies, and let the filter look for them."""
    found = left_out(texts, filter_)
    texts = [text for number, text in enumerate(texts) if number not in found]
    rng = random.Random(seed)
    copied = rng.sample(range(len(texts)), round(planted * len(texts)))
    copies = [(edited(texts[number], share, rng, rng.choice(texts).split()), number) for number in copied]
    mixed = [(text, number) for number, text in enumerate(texts)] + copies
    rng.shuffle(mixed)
    found_now = left_out([text for text, _ in mixed], filter_)
    num_right = len({mixed[number][1] for number in found_now} & set(copied))
    return Figures(len(copied), len(found_now), num_right)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.near_duplicates", description=__doc__)
    parser.add_argument("paths", nargs="+", help="text files, in the formats of a source of files")
    parser.add_argument("--words", type=int, default=300, help="length of a document")
    parser.add_argument("--documents", type=int, default=20_000, help="documents, at most")
    parser.add_argument("--planted", type=float, default=0.01, help="copies per document")
    parser.add_argument("--edited", type=float, default=0.05, help="share of the words of a copy that are changed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = list(stretches(options.paths, options.words))
    random.Random(options.seed).shuffle(texts)
    texts = texts[: options.documents]
    edits = f"copies of {options.planted:.1%} edited by {options.edited:.0%}"
    print(f"{len(texts):,} documents of {options.words} words, {edits}")
    print("\n| settings | planted | left out | recall | precision |\n|---|--:|--:|--:|--:|")
    for settings in SETTINGS:
        figures = measure(
            texts, NearDuplicates(kind="near_duplicates", **settings), options.planted, options.edited, options.seed
        )
        named = ", ".join(f"{name}: {value}" for name, value in settings.items()) or "the defaults"
        print(
            f"| {named} | {figures.num_planted} | {figures.num_left_out} | {figures.recall:.1%} | "
            f"{figures.precision:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
