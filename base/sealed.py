"""JSON that says whether it is whole: an object's digest over all its other content stands in it, under "sha256".

The one encoding of everything that is stored as JSON: strict, so any program can read it. JSON has no NaN and no
infinities; they are stored as the strings "NaN", "Infinity" and "-Infinity", which float() and pydantic read back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from base.errors import DamagedError

SEAL = "sha256"


def dumps(value: Any, **options: Any) -> str:
    """The value as strict JSON. `options` are those of json.dumps."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The value with the names of non-finite numbers in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object as JSON values with its digest in it."""
    plain = json.loads(dumps(value))
    plain.pop(SEAL, None)
    return {**plain, SEAL: _digest(plain)}


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The object in the file `name`, whose content is `data`, without its digest.

    Raises: DamagedError: it is not as it was written, or has no digest.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name}: damaged: it should hold JSON ({error})") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{name}: damaged: it should hold a JSON object")
    found = value.pop(SEAL, None)
    if found is None:
        raise DamagedError(f"{name}: has no digest: it is damaged, or an earlier version of this program wrote it")
    if found != _digest(value):
        raise DamagedError(f"{name}: damaged: its content does not match the digest in it")
    return value


def _digest(plain: dict[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
