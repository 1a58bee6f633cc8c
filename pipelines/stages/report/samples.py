"""Generated text as a page shows it: control characters visible, long runs of empty lines folded."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.stages.report.subjects import Subject

_CONTROL_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "\u2421"}
_EMPTY_LINES = re.compile(r"\n(?:[ \t]*\n){3,}")


@dataclass(frozen=True)
class Sample:
    """What one model made of a prompt."""

    subject: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what each model made of it."""

    caption: str
    prompt: str
    samples: tuple[Sample, ...]


def prompts(subjects: Sequence[Subject]) -> list[Prompt]:
    """All samples, by prompt."""
    found: dict[str, list[Sample]] = {}
    for subject in subjects:
        for measured in subject.measured.values():
            for sample in measured.result.samples:
                found.setdefault(sample.prompt, []).append(Sample(subject.name, readable(sample.text)))
    return [
        Prompt(f"Continuing {prompt!r}" if prompt else "A new document", readable(prompt), tuple(samples))
        for prompt, samples in found.items()
    ]


def readable(text: str) -> str:
    """The text without long gaps; control characters as the pictures that Unicode has for them."""
    return _EMPTY_LINES.sub(_fold, "".join(map(_visible, text)))


def _visible(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) != "Cc":
        return char
    return _CONTROL_PICTURES.get(char, "\ufffd")


def _fold(found: re.Match[str]) -> str:
    return f"\n⋮ {found[0].count(chr(10)) - 1} empty lines\n"


def fenced(text: str) -> str:
    """A Markdown block with the text, its fence longer than any inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
