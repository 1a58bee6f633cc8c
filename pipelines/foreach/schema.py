"""`foreach` in the JSON schema of a pipeline file."""

from __future__ import annotations

import re
from typing import Any

from pipelines.foreach.needs import PATTERN
from pipelines.foreach.values import FIXED, VARIANT

FOREACH = (
    "Fields of this stage and their values. There is one copy of the stage per combination, and of every stage that "
    "needs it; `needs: train[*]` reads all copies. Names of fields may go deeper: model.window_size."
)
VALUES = "Values: a list, or a mapping of names to values. A mapping is laid over the one that the stage has."
VARIANTS = "Several fields at once: a mapping of names to mappings, each of fields of this stage to their values."


def allow_foreach(stage: dict[str, Any]) -> None:
    """Add `foreach` to the schema of a kind's settings. Fields that are required may be there instead."""
    fields = [name for name in stage["properties"] if name not in FIXED]
    values = {
        "description": VALUES,
        "anyOf": [
            {"type": "array", "minItems": 1, "uniqueItems": True},
            {"type": "object", "minProperties": 1},
        ],
    }
    deeper = rf"^({'|'.join(map(re.escape, fields))})\."
    variant = {
        "type": "object",
        "properties": dict.fromkeys(fields, True),
        "patternProperties": {deeper: True},
        "additionalProperties": False,
    }
    variants = {"description": VARIANTS, "type": "object", "minProperties": 1, "additionalProperties": variant}
    stage["properties"]["foreach"] = {
        "description": FOREACH,
        "type": "object",
        "minProperties": 1,
        "properties": {**dict.fromkeys(fields, values), VARIANT: variants},
        "patternProperties": {deeper: values},
        "additionalProperties": False,
    }
    if required := [name for name in stage.pop("required", ()) if name != "kind"]:
        stage["anyOf"] = [{"required": required}, {"required": ["foreach"]}]
    stage["required"] = ["kind"]


def entry_of_needs() -> dict[str, Any]:
    """Schema of one entry of `needs`."""
    return {
        "type": "string",
        "pattern": PATTERN,
        "description": "A stage; of one with `foreach`, the copy that fits. STAGE[*]: all its copies. "
        "STAGE[FIELD=VALUE, ...]: those with these values.",
    }
