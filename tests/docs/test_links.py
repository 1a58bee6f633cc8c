"""Links between pages, and the paths they name, lead to files that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT, is_history, pages, read, without_code

LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)")
PATH = re.compile(r"`((?:base|kernels|bmojo|data|pipelines|configs|docs|tests|benchmarks)/[\w./-]*)`")


def anchors(markdown: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site write them."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), re.M)
    plain = (re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def dead_links(page: str, markdown: str) -> Iterator[str]:
    for target in LINK.findall(without_code(markdown)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not file.exists():
            yield f"{page}: {target}: no such file"
            continue
        text = markdown if not path else file.read_text(encoding="utf-8") if file.suffix == ".md" else ""
        if anchor and text and anchor not in anchors(text):
            yield f"{page}: {target}: no such heading"


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    assert not list(dead_links(page, read(page)))


@pytest.mark.parametrize("page", [page for page in pages() if not is_history(page)])
def test_paths_in_code_exist(page: str) -> None:
    missing = [path for path in PATH.findall(read(page)) if not (ROOT / path).exists()]
    assert not missing, f"{page} names files that do not exist: {missing}"


def test_dead_links_are_found() -> None:
    markdown = "# A `b` heading\n[x](nowhere.md) [y](#a-b-heading) [z](#other) [w](https://example.org) `[v](code)`\n"
    assert list(dead_links("README.md", markdown)) == [
        "README.md: nowhere.md: no such file",
        "README.md: #other: no such heading",
    ]


def test_every_design_page_has_a_number_of_its_own_and_is_listed() -> None:
    names = [page.name for page in (ROOT / "docs" / "design").glob("0*.md")]
    assert len({name[:4] for name in names}) == len(names)
    listed = read("docs/design/README.md")
    for name in names:
        assert f"[{name[:4]} " in listed, name
        assert f"({name})" in listed, name
        assert read(f"docs/design/{name}").startswith(f"# {name[:4]}"), name
