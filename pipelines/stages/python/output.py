"""The result of a `python` stage: what its function returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from pipelines.engine.stage import StageOutput
from pipelines.stages.python.running import checked_name


class PythonOutput(StageOutput):
    """Numbers and texts by the names that the function gave them; `output["name"]` is one of either."""

    numbers: dict[str, int | float] = Field(description="Figures; runs are compared by them.")
    texts: dict[str, str]

    @classmethod
    def of(cls, returned: Any) -> Self:
        """The output for what a function returned. Raises ValueError: it is not a flat mapping of facts."""
        if returned is None:
            returned = {}
        if not isinstance(returned, Mapping):
            raise ValueError(f"found a {type(returned).__name__}, expected a dict of numbers and texts, or None")
        numbers: dict[str, int | float] = {}
        texts: dict[str, str] = {}
        for name, value in returned.items():
            checked_name(name)
            plain = value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else value  # of numpy
            if isinstance(plain, str):
                texts[name] = plain
            elif isinstance(plain, int | float):
                numbers[name] = plain
            else:
                raise ValueError(
                    f"found a {type(value).__name__} at {name!r}, expected a number or text; larger results belong "
                    "into files in stage.folder"
                )
        return cls(numbers=numbers, texts=texts)

    def __getitem__(self, name: str) -> int | float | str:
        """One fact. Raises KeyError."""
        return self.numbers[name] if name in self.numbers else self.texts[name]

    def summary(self) -> str | None:
        """All facts."""
        return ", ".join(f"{name} {value}" for name, value in self.report_cells().items()) or None

    def figures(self) -> dict[str, float]:
        """The numbers."""
        return {name: float(value) for name, value in self.numbers.items()}

    def report_cells(self) -> dict[str, str]:
        """All facts, numbers to four digits."""
        numbers = {name: f"{n:,}" if isinstance(n, int) else f"{n:.4g}" for name, n in self.numbers.items()}
        return numbers | self.texts
