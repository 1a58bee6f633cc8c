"""Tables in CONTRIBUTING.md that list what the code has."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT, read

PACKAGES = ("kernels", "bmojo", "data", "pipelines")


def test_every_variable_of_ours_is_in_the_table() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    used = {name for path in sources for name in re.findall(r"\bBMOJO_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"^\| `(BMOJO_[A-Z_]+)`", read("CONTRIBUTING.md"), re.M))
    assert used - {"BMOJO_EXPORT"} == listed
