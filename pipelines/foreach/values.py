"""The fields and values of a `foreach`: their names, and how a value is laid over the stage as it is written."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from pipelines.config_errors import shown
from pipelines.errors import FieldError

FIXED = ("kind", "needs", "foreach")
"""Fields that are the same in all copies of a stage."""
VARIANT = "variant"
"""Stands in a `foreach` for several fields at once: each of its values is a mapping of fields to theirs."""


@dataclass(frozen=True, eq=False)
class Value:
    """One value of a field. Two are the same only if they are one object."""

    name: str  # in the names of copies
    key: str | int  # where it stands in the file: the name given there, or the number of the entry
    value: Any


@dataclass(frozen=True, eq=False)
class ForeachField:
    """A field of a template and its values. Two are the same only if they are one object."""

    stage: str  # the template that has the `foreach`
    path: str  # of the field, within the stage: `seed`, `model.window_size`
    values: tuple[Value, ...]

    @property
    def where(self) -> tuple[str, ...]:
        """Where it is written, from the top of the pipeline file."""
        return ("stages", self.stage, "foreach", self.path)

    def placed(self, value: Value) -> list[Placed]:
        """One of its values in the stage's fields: several if it is that of a variant."""
        where = (*self.where, str(value.key))
        if self.path != VARIANT:
            return [Placed(_parts(self.path), value.value, where)]
        return [Placed(_parts(path), inner, (*where, path)) for path, inner in value.value.items()]


class Placed(NamedTuple):
    """A value in a field of the stage."""

    parts: tuple[str, ...]  # the field's path, cut at its dots
    value: Any
    where: tuple[str, ...]  # it is written, from the top of the pipeline file


def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def read_foreach(stage: str, foreach: Any) -> tuple[ForeachField, ...]:
    """The fields of a stage's `foreach`, in the order in which they are written.

    Raises: FieldError: the form is wrong, a field cannot be varied, or a value has no name, or that of another.
    """
    if not isinstance(foreach, dict) or not foreach:
        raise FieldError(
            ("stages", stage, "foreach"),
            f"found {shown(foreach)}, expected a mapping of fields to their values, such as {{seed: [0, 1, 2]}}.",
        )
    fields = tuple(_read_field(stage, path, values) for path, values in foreach.items())
    for field in fields:
        if field.path == VARIANT:
            _check_variant(field, beside=foreach.keys())
    return fields


def _check_variant(field: ForeachField, beside: Container[str]) -> None:
    for value in field.values:
        where = (*field.where, str(value.key))
        if not isinstance(value.value, dict):
            expected = "a mapping of fields to their values, such as {lr: 1e-3, model: bmojo-130m}"
            raise FieldError(where, f"found {shown(value.value)}, expected {expected}.")
        for path in value.value:
            _check_path((*where, path), path)
            if path in beside:
                raise FieldError((*where, path), f"{path!r} is a field of this `foreach` too. Vary it in one place.")


def _check_path(where: tuple[str, ...], path: str) -> None:
    parts = _parts(path)
    if not all(parts):
        raise FieldError(where, f"found {path!r}, expected a field of the stage, such as seed or model.window_size.")
    if parts[0] in FIXED:
        raise FieldError(where, f"{parts[0]!r} is the same in all copies of a stage. Write another stage instead.")


def _read_field(stage: str, path: str, values: Any) -> ForeachField:
    where = ("stages", stage, "foreach", path)
    _check_path(where, path)
    if not isinstance(values, dict | list):
        raise FieldError(where, f"found {shown(values)}, expected a list of values, or a mapping of names to values.")
    if not values:
        raise FieldError(where, f"found {shown(values)}, expected at least one value.")
    found: dict[str, Value] = {}
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        name = clean_name(key) if isinstance(key, str) else name_of(value)
        spot = (*where, str(key))
        named = f"Name the values: {path}: {{NAME: VALUE, ...}}."
        if name is None and isinstance(key, str):
            raise FieldError(
                spot, f"{key!r} cannot be part of a stage's name. Use ASCII letters, digits, `-`, `_` and `.`."
            )
        if name is None:
            raise FieldError(spot, f"{shown(value)} cannot be part of a stage's name. {named}")
        if name in found:
            both = f"{shown(found[name].value)} and {shown(value)}"
            raise FieldError(spot, f"{both} are both called {name!r}. Give each value once. {named}")
        found[name] = Value(name, key, value)
    return ForeachField(stage, path, tuple(found.values()))


def clean_name(text: str) -> str | None:
    """Text as part of a stage's name, a dot as `_`; None: it has characters that no such name can have."""
    text = text.replace(".", "_")
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else None


def name_of(value: Any) -> str | None:
    """The name of a value that was given none; None: it needs one. It depends on nothing but the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return clean_name(_shortest(value))
    if isinstance(value, int | str):
        return clean_name(str(value))
    if isinstance(value, list) and value and not any(isinstance(entry, list) for entry in value):
        names = [name_of(entry) for entry in value]
        return "-".join(name for name in names if name) if all(names) else None
    return None


def _shortest(number: float) -> str:
    """A number in the shorter of its two forms: 0.95, 1e-3."""
    if not math.isfinite(number):
        return str(number)
    exact = Decimal(repr(number))
    plain = f"{exact:f}".removesuffix(".0")
    sign, digits, exponent = exact.normalize().as_tuple()
    assert isinstance(exponent, int)
    first, *rest = map(str, digits)
    mantissa = "-" * sign + first + ("." + "".join(rest) if rest else "")
    return min(plain, f"{mantissa}e{exponent + len(rest)}", key=len)


def place(settings: Mapping[str, Any], placed: Iterable[Placed]) -> dict[str, Any]:
    """The settings of a stage with values in their fields: a mapping is laid over the field's own, others replace it.

    Args: settings: as written, without `foreach`. placed: the shallower field first, so that a deeper one has the
        last word.
    Raises: FieldError: a field is inside of something that has no fields.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(settings))
    for parts, value, where in placed:
        node = changed
        *outer, last = parts
        for depth, part in enumerate(outer, 1):
            inner = _with_preset(part, node.setdefault(part, {}))
            if not isinstance(inner, dict):
                raise FieldError(where, f"{'.'.join(outer[:depth])} is {shown(inner)}, which has no fields.")
            node[part] = inner
            node = inner
        node[last] = _laid_over(last, node.get(last), copy.deepcopy(value))
    return changed


def replaces(settings: Mapping[str, Any], placed: Placed, path: tuple[str, ...]) -> bool:
    """Whether a value leaves nothing of what the stage's own settings have at `path`."""
    parts, value, _ = placed
    if path[: len(parts)] != parts:
        return False
    own = _at(settings, parts)
    laid = _with_preset(parts[-1], value)
    if not _merge(own, laid):
        return True
    keys = path[len(parts) :][:1] or tuple(own)
    return bool(keys) and all(key in laid for key in keys)


def written_as(settings: Mapping[str, Any], placed: Iterable[Placed], path: tuple[str | int, ...]) -> tuple[str, ...]:
    """Where the file says what place() has put at `path` of the stage, from the template on.

    Args: placed: the deeper field first.
    """
    for parts, value, (_, _, *where) in placed:
        depth = len(parts)
        if path and len(path) < depth and path == parts[: len(path)] and not _has(settings, path):
            return tuple(where[:-1])
        if path[:depth] == parts:
            rest = path[depth:]
            if isinstance(value, str) and rest[:1] == ("preset",):
                rest = rest[1:]
            if not rest or _has(value, rest[:1]) or not _has(settings, path[: depth + 1]):
                return (*where, *map(str, rest))
    return tuple(map(str, path))


def _laid_over(name: str, own: Any, value: Any) -> Any:
    below, above = _with_preset(name, own), _with_preset(name, value)
    return {**below, **above} if _merge(below, above) else value


def _merge(own: Any, value: Any) -> bool:
    """Whether a value is laid over what is there. Fields of another `kind` would mean nothing."""
    is_mapping = isinstance(own, dict) and isinstance(value, dict)
    return is_mapping and value.get("kind", own.get("kind")) == own.get("kind")


def _with_preset(name: str, value: Any) -> Any:
    """`model: NAME` is short for `model: {preset: NAME}`."""
    return {"preset": value} if name == "model" and isinstance(value, str) else value


def _at(settings: Any, path: Iterable[str | int]) -> Any:
    for part in path:
        settings = _with_preset(str(part), settings.get(part)) if isinstance(settings, dict) else None
    return settings


def _has(settings: Any, path: tuple[str | int, ...]) -> bool:
    above = _at(settings, path[:-1])
    return isinstance(above, dict) and path[-1] in above
