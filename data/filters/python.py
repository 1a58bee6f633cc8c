"""A function of the user's own as a filter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field

from base.own_code import FUNCTION, OwnCode
from data.errors import DataError
from data.filters.filter import Filter, Judge, Rejection

_SHOWN_CHARACTERS = 60


class Python(OwnCode, Filter):
    """Ask a function of yours about each text: true keeps it, false or a text that says why leaves it out."""

    kind: Literal["python"]
    call: str = Field(pattern=FUNCTION, description="The function as `module:function`. It gets the text.")

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
