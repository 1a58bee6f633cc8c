"""A function of the user's own as a filter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from data.errors import DataError
from data.filters.filter import Filter, Judge, Rejection

_MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_SHOWN_CHARACTERS = 60
_NOT_IN_FINGERPRINT: dict[str, Any] = {"affects_result": False}  # as pipelines.engine.stage reads it


class Python(Filter):
    """Ask a function of yours about each text: true keeps it, false or a text that says why leaves it out."""

    kind: Literal["python"]
    call: str = Field(
        pattern=rf"^{_MODULE}:{_MODULE}$", description="The function as `module:function`. It gets the text."
    )
    modules: tuple[str, ...] = Field(
        (),
        description="Modules whose source counts and travels besides that of `call` and what this imports from the "
        "same folders: those that are imported by a name computed at run time.",
        json_schema_extra=_NOT_IN_FINGERPRINT,  # their source counts
    )
    folder: str | None = Field(
        None,
        min_length=1,
        description="Folder in which modules are looked up, before the current one and installed packages; left out: "
        "that of the pipeline file.",
        json_schema_extra=_NOT_IN_FINGERPRINT,
    )

    @model_validator(mode="before")
    @classmethod
    def _beside_the_pipeline_file(cls, fields: Any, info: ValidationInfo) -> Any:
        known = info.context or {}
        if isinstance(fields, dict) and fields.get("folder") is None and "pipeline_folder" in known:
            return {**fields, "folder": known["pipeline_folder"]}
        return fields

    def judge(self) -> Judge:
        """Import the function. Raises DataError: it is not there; and when it judges: it raised, or returned else."""
        function = self._function()

        def judge(text: str) -> str | Rejection:
            shown = repr(text[:_SHOWN_CHARACTERS])
            try:
                answer = function(text)
            except Exception as error:
                raise DataError(
                    f"filters: {self.call} raised {type(error).__name__}: {error}, for a text that begins {shown}. "
                    "Correct the function."
                ) from error
            if answer is True:
                return text
            if answer is False or isinstance(answer, str):
                return Rejection("predicate", answer or self.call)
            raise DataError(
                f"filters: {self.call} returned {answer!r:.80} for a text that begins {shown}, expected true, or false "
                "or a text that says why. Correct the function."
            )

        return judge

    def _function(self) -> Callable[[str], Any]:
        module, _, path = self.call.partition(":")
        with _first_on_path(self.folder):
            try:
                found: Any = importlib.import_module(module)
                for name in path.split("."):
                    found = getattr(found, name)
            except (ImportError, AttributeError, SyntaxError) as error:
                raise DataError(f"filters: {self.call} cannot be imported: {error}. Correct `call`.") from error
        function: Callable[[str], Any] = found
        return function


@contextmanager
def _first_on_path(folder: str | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
