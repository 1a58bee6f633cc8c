"""Check prose: `python docs/lint.py [FILE ...]` prints `file:line: problem` and exits with 1 if there is any.

Markdown: lines of at most 120 characters and sentences of at most 25 words, outside code blocks, tables and headings.
All text files: no words from WORDS. Generated pages are left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MAX_WIDTH = 120  # characters per line
MAX_WORDS = 25  # per sentence
GENERATED = ("benchmarks/kernel_report/report.md", "benchmarks/kernel_report/peers.md")
CHECKED = {".md", ".py", ".yaml", ".yml", ".toml", ".j2", ".cpp", ".h"}
_COUNTED = "bytes|[kMG]i?B|nats|[mu]s|tokens?|heads|times|lines?|files?|rows?|sums?|numbers?|one"
_COUNTED_BY = (
    "token|step|layer|head|sequence|core|task|slice|stage|mixer|worker|group|row|chunk|second|run|thread|query|channel"
)
WORDS = {  # old or mannered words, and what to write instead
    r"mend(s|ed|ing)?": "fix",
    r"anew": "again",
    r"for ever": "forever",
    r"unfit": "invalid",
    r"heirs?": "successor",
    r"carr(y|ies|ied) on": "resume, continue",
    r"(is|are|be) at work": "running",
    r"whose fault": "cause",
    rf"({_COUNTED}) an? ({_COUNTED_BY})": "per",
}
_WORDS = {re.compile(rf"\b{pattern}\b", re.IGNORECASE): instead for pattern, instead in WORDS.items()}
_NOT_PROSE = re.compile(r"^\s*(\||#|<|!\[|:::|\[[^\]]+\]: |---)")
_NEW_BLOCK = re.compile(r"^\s*([-*+]|\d+\.|>)\s+")
_LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)")
_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+|:\s*$")


class Problem(NamedTuple):
    line: int
    text: str


class Block(NamedTuple):
    """A paragraph or list item: its first line's number and its lines."""

    line: int
    lines: list[str]


def blocks(markdown: str) -> Iterator[Block]:
    """Yield the prose of a page: no fenced or indented code, tables, headings, images or HTML."""
    block = Block(0, [])
    fence = None
    in_list = False
    for number, line in enumerate(markdown.splitlines(), 1):
        marker = re.match(r"\s*(```+|~~~+)", line)
        if marker and (fence is None or line.strip() == fence):
            fence = marker[1] if fence is None else None
            starts, prose = True, False
        else:
            prose = fence is None and bool(line.strip()) and not _NOT_PROSE.match(line)
            starts = not prose or bool(_NEW_BLOCK.match(line))
            in_list = (in_list and (not line.strip() or line.startswith(" "))) or bool(_NEW_BLOCK.match(line))
            if prose and line.startswith("    ") and not in_list and not block.lines:
                prose = False  # indented code
        if starts:
            if block.lines:
                yield block
            block = Block(number, [])
        if prose:
            block = block if block.lines else Block(number, [])
            block.lines.append(line)
    if block.lines:
        yield block


def sentences(block: Block) -> Iterator[str]:
    """Yield the sentences of a block, with code as one word and links as their text."""
    text = _LINK.sub(r"\1", _CODE.sub("Code", " ".join(block.lines)))
    yield from (sentence for sentence in _END.split(_NEW_BLOCK.sub("", text)) if sentence and sentence.strip())


def words(sentence: str) -> int:
    """Count what holds a letter: figures and signs are not words."""
    return sum(bool(re.search(r"[^\W\d_]", token)) for token in sentence.split())


def check_markdown(markdown: str) -> Iterator[Problem]:
    """Find long lines and long sentences."""
    for block in blocks(markdown):
        for number, line in enumerate(block.lines, block.line):
            if len(line) > MAX_WIDTH and " " in line.strip()[:MAX_WIDTH]:
                yield Problem(number, f"{len(line)} characters, at most {MAX_WIDTH} are allowed")
        for sentence in sentences(block):
            if (count := words(sentence)) > MAX_WORDS:
                yield Problem(block.line, f"{count} words, at most {MAX_WORDS} are allowed: {sentence[:60]} ...")


def check_words(text: str) -> Iterator[Problem]:
    """Find the words of WORDS."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, instead in _WORDS.items():
            if found := pattern.search(line):
                yield Problem(number, f"{found[0]!r}: write {instead!r}")


def check(path: Path) -> list[Problem]:
    """All problems of a file."""
    text = path.read_text(encoding="utf-8")
    return [*check_words(text), *(check_markdown(text) if path.suffix == ".md" else ())]


def files() -> list[Path]:
    """Tracked and new text files, except for generated ones and this one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    left_out = (*GENERATED, "docs/lint.py", "tests/docs/test_prose.py")
    paths = [ROOT / name for name in names if name not in left_out]
    return [path for path in paths if path.suffix in CHECKED and path.is_file()]


def main(chosen: list[str]) -> int:
    """Print the problems of the chosen files, or of all. Returns the exit code."""
    found = 0
    for path in [Path(name).resolve() for name in chosen] or files():
        for problem in check(path):
            print(f"{path.relative_to(ROOT)}:{problem.line}: {problem.text}")
            found += 1
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
