"""Hooks of mkdocs: the site holds the Markdown of the whole repository, and one page per module with its docstrings.

mkdocs knows one folder of pages. Here every tracked page, and every file that a page links to, is added under its path
in the repository. A link to a folder leads to its README.md.
"""

from __future__ import annotations

import ast
import posixpath
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tuple(name for name in ("base", "kernels", "bmojo", "data", "pipelines") if (ROOT / name).is_dir())
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def _tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(name for name in listed if (ROOT / name).is_file())


def _has_public_docstrings(file: str) -> bool:
    """Whether a module says something to its readers: device code and modules without definitions are left out."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    public = [
        node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]
    return ast.get_docstring(tree) is not None and (bool(public) or file.endswith("__init__.py"))


def _modules() -> dict[str, str]:
    """Page of each documented module, by the module's dotted name."""
    files = [file for package in PACKAGES for file in _tracked(f"{package}/*.py")]
    names = {
        file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
        for file in files
        if "/_" not in file.replace("/__init__.py", "") and _has_public_docstrings(file)
    }
    return {name: f"api/{name.replace('.', '/')}.md" for name in sorted(names)}


def _linked_files(pages: list[str]) -> Iterator[str]:
    for page in pages:
        for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if (ROOT / path).is_file():
                yield path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by the whole repository's pages under their own paths."""
    pages = _tracked("*.md")
    kept = [file for file in files if file.abs_src_path is None or not Path(file.abs_src_path).is_relative_to(ROOT)]
    ours = sorted({*pages, *_linked_files(pages)})
    added = [File.generated(config, path, abs_src_path=str(ROOT / path)) for path in ours]
    api = [File.generated(config, page, content=f"# {name}\n\n::: {name}\n") for name, page in _modules().items()]
    return Files([*kept, *added, *api])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the parts of the navigation that follow from the files."""
    filled: dict[str, Any] = {
        "Operators": ["kernels/README.md", *_tracked("kernels/*/README.md")],
        "API": [{package: [p for n, p in _modules().items() if n.split(".")[0] == package]} for package in PACKAGES],
        "Design": ["docs/design/README.md", *_tracked("docs/design/0*.md")],
        "Measurements": [
            "benchmarks/README.md",
            *(p for p in _tracked("benchmarks/*.md") if p != "benchmarks/README.md"),
        ],
    }
    config.nav = [{title: filled.get(title, content) for title, content in entry.items()} for entry in config.nav or []]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a link to a folder lead to the folder's README.md."""

    def resolved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[1]))
        return match[1].rstrip("/") + "/README.md" if (ROOT / path / "README.md").is_file() else match[1]

    return LINK.sub(resolved, markdown)
