"""List the benchmarks: the name and first line of every module in this folder."""

from __future__ import annotations

import ast
from pathlib import Path

for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
    summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    print(f"  python -m benchmarks.{file.stem:<18} {summary}")
