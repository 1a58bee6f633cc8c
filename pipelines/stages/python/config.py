"""Settings of the `python` stage."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipelines.engine.stage import NOT_IN_FINGERPRINT, Resources, StageConfig

_MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


class PythonStageConfig(StageConfig):
    """Call a function of yours, in one Ray task."""

    kind: Literal["python"]
    call: str = Field(
        pattern=rf"^{_MODULE}:{_MODULE}$",
        description="The function as `module:function`, such as `my_module:count` or `package.module:Class.method`.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the function, any YAML; it finds them in `stage.args`."
    )
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

    @field_validator("args")
    @classmethod
    def _args_are_like_json(cls, args: dict[str, Any]) -> dict[str, Any]:
        _check_like_json(args, "")
        return args

    @field_validator("modules")
    @classmethod
    def _modules_are_names(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        for module in modules:
            if not re.fullmatch(_MODULE, module):
                raise ValueError(f"found {module!r}, expected a module's name, such as my_module or package.module.")
        return modules

    @field_validator("resources")
    @classmethod
    def _is_one_task(cls, resources: Resources) -> Resources:
        if resources.num_workers != 1:
            raise ValueError(
                f"num_workers: found {resources.num_workers}, but the function is called once, in one task. Leave it "
                "out; cpus_per_worker and gpus_per_worker say what that task reserves."
            )
        return resources


def _check_like_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_like_json(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_like_json(item, f"{where}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: found {value}, expected a finite number.")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{where}: found a {type(value).__name__} ({value}), expected text, a number, true, false, nothing, a list "
            "or a mapping. Put it in quotes to pass it as text."
        )
