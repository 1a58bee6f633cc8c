"""Settings that name code of the user's own: where it lies, and which modules it is made of."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from base.config import NOT_IN_FINGERPRINT, StrictConfig

_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
FUNCTION = rf"^{_NAME}:{_NAME}$"
"""Pattern of `module:function`."""


class OwnCode(StrictConfig):
    """Beside these fields, `call` names a function."""

    modules: tuple[str, ...] = Field(
        (),
        description="Modules whose source counts and travels besides that of `call` and what this imports from the "
        "same folders: those that are imported by a name computed at run time.",
        json_schema_extra=NOT_IN_FINGERPRINT,  # their source counts
    )
    folder: str | None = Field(
        None,
        min_length=1,
        description="Folder in which modules are looked up, before the current one and installed packages; left out: "
        "that of the pipeline file.",
        json_schema_extra=NOT_IN_FINGERPRINT,
    )

    @model_validator(mode="before")
    @classmethod
    def _beside_the_pipeline_file(cls, fields: Any, info: ValidationInfo) -> Any:
        known = info.context or {}
        if isinstance(fields, dict) and fields.get("folder") is None and "pipeline_folder" in known:
            return {**fields, "folder": known["pipeline_folder"]}
        return fields

    @field_validator("modules")
    @classmethod
    def _modules_are_names(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        for module in modules:
            if not re.fullmatch(_NAME, module):
                raise ValueError(f"found {module!r}, expected a module's name, such as my_module or package.module.")
        return modules
