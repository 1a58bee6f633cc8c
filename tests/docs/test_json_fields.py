"""The guide's table of JSON fields names every field that the commands print, and no other."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from pipelines.api import difference, garbage, listing, log_lines, presets, reasons, results, resuming, run_status
from pipelines.engine.stage import Facts
from pipelines.memory.store import DocumentRecord
from tests.docs.pages import read

OBJECTS: dict[str, type[BaseModel]] = {
    name: kind
    for module in (difference, garbage, listing, log_lines, presets, reasons, results, resuming, run_status)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Facts) and kind.__module__.startswith("pipelines.api")
} | {"DocumentRecord": DocumentRecord}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_guide_has_the_fields_of_each_object(name: str) -> None:
    (cells,) = re.findall(rf"^\| .*\| {name}\b[^|]*\| (.*) \|$", read("docs/guide.md"), re.M)
    assert [word for word in re.findall(r"`(\w+)`", cells) if not word.isupper()] == list(OBJECTS[name].model_fields)
