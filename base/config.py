"""The kind of pydantic model that all settings are, and marks of fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

NOT_IN_FINGERPRINT: dict[str, Any] = {"affects_result": False}
"""Pass as `json_schema_extra` to mark a field that cannot change a stage's result (resources, logging, ...)."""
ADDED_LATER: dict[str, Any] = {"affects_result": "unless default"}
"""Pass it to mark a field whose default means what was done before there was the field, so that results are reused."""


class StrictConfig(BaseModel):
    """Unknown keys are errors; nothing is written into a config after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
