"""The sums of each document, example or window behind a figure, as measures keep them beside their results."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from base.errors import DamagedError
from pipelines.stages.uncertainty import Ratio


@dataclass(frozen=True)
class Units:
    """The sums behind a figure, and the identity of what they are of: equal ones can be compared unit by unit."""

    ratio: Ratio
    identity: str


@lru_cache(maxsize=64)
def read_units(file: Path, figure: str) -> Units | None:
    """The units of a figure; None if the file has none of it. Raises DamagedError."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if f"{figure}.numerator" not in arrays:
                return None
            ratio = Ratio(arrays[f"{figure}.numerator"], arrays[f"{figure}.denominator"])
            return Units(ratio, str(arrays["identity"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedError(f"{file} is damaged: {error}") from error
