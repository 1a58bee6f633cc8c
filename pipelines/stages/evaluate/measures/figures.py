"""Figures out of the sums of units, with their intervals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from base.sealed import dumps
from pipelines.stages.evaluate.results import CurvePoint, Figure
from pipelines.stages.uncertainty import Ratio, Transform, interval


def figure_of(name: str, ratio: Ratio, transform: Transform = "identity", **fields: Any) -> Figure:
    """A figure with its interval. Args: fields: the others of Figure."""
    value, low, high = interval(ratio, transform)
    return Figure(name=name, value=value, low=low, high=high, transform=transform, **fields)


def point_of(x: float, ratio: Ratio, transform: Transform = "identity") -> CurvePoint:
    """A point of a curve with its interval."""
    value, low, high = interval(ratio, transform)
    return CurvePoint(x=x, y=value, low=low, high=high)


def text_array(texts: Sequence[str]) -> np.ndarray:
    """Texts as an array of bytes. NumPy's own arrays of text lose zeros at their ends."""
    return np.frombuffer(dumps(list(texts)).encode(), np.uint8)


def texts_of(array: np.ndarray) -> list[str]:
    """The texts in an array of text_array."""
    found: list[str] = json.loads(array.tobytes())
    return found


def identity_of(*parts: Any) -> str:
    """SHA-256 of what units are: JSON values and arrays, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else dumps(part).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
