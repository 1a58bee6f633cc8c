"""Settings of the `python` stage."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from base.own_code import FUNCTION, OwnCode
from pipelines.engine.stage import Resources, StageConfig


class PythonStageConfig(OwnCode, StageConfig):
    """Call a function of yours, in one Ray task."""

    kind: Literal["python"]
    call: str = Field(
        pattern=FUNCTION,
        description="The function as `module:function`, such as `my_module:count` or `package.module:Class.method`.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the function, any YAML; it finds them in `stage.args`."
    )

    @field_validator("args")
    @classmethod
    def _args_are_like_json(cls, args: dict[str, Any]) -> dict[str, Any]:
        _check_like_json(args, "")
        return args

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
