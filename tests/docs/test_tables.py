"""Tables in CONTRIBUTING.md that list what the code has."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kernels.operator import OPERATORS
from kernels.overview import load_all
from tests.docs.pages import ROOT, read

PACKAGES = ("base", "kernels", "bmojo", "data", "pipelines")


def test_every_variable_of_ours_is_in_the_table() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    used = {name for path in sources for name in re.findall(r"\bBMOJO_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"^\| `(BMOJO_[A-Z_]+)`", read("CONTRIBUTING.md"), re.M))
    assert used - {"BMOJO_EXPORT"} == listed


def test_the_matrix_of_operators_is_that_of_their_declarations() -> None:
    listed = re.findall(r"^\| `\w+` \|.*$", read("CONTRIBUTING.md").partition("## Operators")[2], re.M)
    assert listed == list(matrix())


def matrix() -> Iterator[str]:
    """Rows of CONTRIBUTING.md's table of operators: `python -m tests.docs.test_tables` prints them."""
    load_all()
    for name, operator in sorted(OPERATORS.items()):
        cells = ["yes" if operator.path("reference") else "-", "every dtype"]
        for path in map(operator.path, ("cpp", "triton")):
            dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in path.tolerance) if path else []
            cells.append(", ".join(dtypes) or ("yes" if path else "-"))
        yield f"| `{name}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(matrix()))
