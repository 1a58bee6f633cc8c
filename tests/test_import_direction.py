"""Imports point one way (docs/design/0001): kernels <- bmojo; data stands alone; pipelines may import all three."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "bmojo": {"kernels"},
    "data": set(),
    "pipelines": {"kernels", "bmojo", "data"},
}
ONLY_PIPELINES = {"ray", "mlflow", "deepspeed"}


def imported_packages(file: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, str(node.module).split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    if package != "pipelines":
        forbidden |= ONLY_PIPELINES
    files = list((ROOT / package).rglob("*.py"))
    assert files, f"no Python file under {package}/"
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {package} may not import {name}"
        for file in files
        for line, name in imported_packages(file)
        if name in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_functions_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "def function():\n    import ray.train\n    from mlflow import log_metric\n    from . import sibling\n"
    )
    assert list(imported_packages(file)) == [(2, "ray"), (3, "mlflow")]
