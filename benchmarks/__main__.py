"""List the benchmarks: the name and first line of every module or package in this folder."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
for file in sorted([*FOLDER.glob("[!_]*.py"), *FOLDER.glob("*/__init__.py")]):
    name = file.parent.name if file.name == "__init__.py" else file.stem
    summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    print(f"  python -m benchmarks.{name:<18} {summary}")
