"""Pages of the repository, and what their checks read from them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^ *(?P=ticks) *$", re.M | re.S
)


class Snippet(NamedTuple):
    """A fenced block: its language (may be empty), its text, and the number of its first line."""

    language: str
    code: str
    line: int


def pages() -> list[str]:
    """Every Markdown file, tracked or new, by its path in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(name for name in names if (ROOT / name).is_file())


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(markdown: str) -> Iterator[Snippet]:
    for match in _FENCE.finditer(markdown):
        code = "".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines(keepends=True))
        yield Snippet(match["language"], code, markdown.count("\n", 0, match.start("code")) + 1)


def without_code(markdown: str) -> str:
    """The page with fenced blocks and inline code blanked out, so that brackets in code are no links."""
    return re.sub(r"`[^`\n]+`", "", _FENCE.sub("", markdown))


def is_history(page: str) -> bool:
    """Whether a page describes the code of its day: it may name files and commands that are gone."""
    return page in ("CHANGELOG.md", "docs/LOG.md") or bool(re.search(r"_\d{4}-\d\d-\d\d\.md$", page))


def commands(markdown: str) -> Iterator[tuple[int, str]]:
    """Line numbers and text of the shell commands of a page: `$ command` in console blocks, and inline code."""
    for snippet in snippets(markdown):
        if snippet.language in ("console", "sh", "bash"):
            joined = re.sub(r"\\\n *", " ", snippet.code)
            for number, line in enumerate(joined.splitlines(), snippet.line):
                if snippet.language != "console" or line.startswith("$ "):
                    yield number, line.removeprefix("$ ").partition("  #")[0].strip()
    prose = _FENCE.sub(lambda block: "\n" * block[0].count("\n"), markdown)
    for match in re.finditer(r"`((?:bmojo|make|python -m|pip install) [^`\n]+)`", prose):
        yield prose.count("\n", 0, match.start()) + 1, match[1]
