"""The kind of pydantic model that all settings are."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """Unknown keys are errors; nothing is written into a config after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
