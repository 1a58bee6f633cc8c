"""Settings of optimizers. Importing this imports no torch: pipelines are checked without it."""

from __future__ import annotations

from pydantic import Field

from base.config import StrictConfig


class GroupConfig(StrictConfig):
    """Other settings for some of the parameters."""

    match: str = Field(
        min_length=1,
        description="Names of parameters, `*` standing for any text: `embedding.*`, `*.mixer.A_log`. The first group "
        "that matches a parameter counts.",
    )
    lr_ratio: float = Field(1.0, ge=0, description="Their learning rate, in units of lr; 0 keeps them as they are.")
    weight_decay: float | None = Field(
        None, ge=0, description="Their decay; null: as without the group, which is none for norms and SSM parameters."
    )
