"""docs/lint.py finds what it should, and nothing in code blocks, tables and headings."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def lint() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_lint", ROOT / "docs" / "lint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LONG = "A" + " a" * 25


@pytest.mark.parametrize(
    ("markdown", "problems"),
    [
        ("a" * 10 + " " + "a" * 111 + "\n", ["2: 122 characters"]),
        (f"First.\n{LONG}.\n", ["2: 26 words"]),
        (f"- First.\n- {LONG}.\n", ["3: 26 words"]),
        ("A a. " + LONG[:-2] + ".\n", []),
        (f"```\n{LONG}\n```\n| {LONG} |\n# {LONG}\n", []),
        ("[" + "a" * 130 + "](b.md)\n", []),
        (f"`{LONG}` [{LONG[:-4]}](b.md)\n", []),
    ],
)
def test_long_lines_and_sentences_are_found(lint: ModuleType, markdown: str, problems: list[str]) -> None:
    found = [f"{problem.line}: {problem.text}" for problem in lint.check_markdown(f"# Title\n{markdown}")]
    assert len(found) == len(problems), found
    assert all(text.startswith(start) for text, start in zip(found, problems, strict=True)), found


def test_words_are_found(lint: ModuleType) -> None:
    text = "mending it\nan amendment\nfor ever\nforever\nanew"
    assert [problem.line for problem in lint.check_words(text)] == [1, 3, 5]
