"""What pydantic found wrong in a pipeline file, in that file's words: line, field as written, likely remedy."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

MAX_ERRORS_SHOWN = 8


class FieldLines:
    """Line numbers of the fields of a YAML document."""

    def __init__(self, root: yaml.Node | None) -> None:
        self.root = root

    def of(self, field_path: Sequence[str | int]) -> int | None:
        """Line (from 1) of the deepest part of the path that stands in the file."""
        node, line = self.root, None
        for part in field_path:
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line


def describe_errors(
    error: ValidationError, root: type[BaseModel], raw: dict[str, Any], origin: str, lines: FieldLines
) -> str:
    """One line a mistake: file, line, field, what was found, what was expected."""
    problems = []
    for item in error.errors()[:MAX_ERRORS_SHOWN]:
        field_path, model = _as_written(item["loc"], raw), _model_at(root, item["loc"])
        line = lines.of(field_path)
        where = ".".join(str(part) for part in field_path)
        prefix = f"{origin}{f':{line}' if line else ''}: {where + ': ' if where else ''}"
        problems.append(prefix + _explain(item, field_path, model))
    if error.error_count() > MAX_ERRORS_SHOWN:
        problems.append(f"... and {error.error_count() - MAX_ERRORS_SHOWN} more.")
    return "\n".join(problems)


def _explain(item: Any, field_path: Sequence[str | int], model: type[BaseModel] | None) -> str:
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        known = list(model.model_fields) if model else []
        return f"unknown key.{suggest(str(field_path[-1]), known)}"
    if kind == "missing":
        return "this field is required and missing."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        found = item["input"].get("kind") if isinstance(item["input"], dict) else item["input"]
        expected = item.get("ctx", {}).get("expected_tags", "a mapping with a `kind`")
        return f"found kind {found!r}, expected one of {expected}."
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return f"found {item['input']!r:.80}. {message}."


def _as_written(loc: Sequence[str | int], raw: Any) -> list[str | int]:
    """The path as the user wrote it; pydantic adds the tags of unions to it."""
    path: list[str | int] = []
    node: Any = raw
    for index, part in enumerate(loc):
        is_tag = isinstance(node, dict) and part == node.get("kind") and part not in node
        if is_tag and index != len(loc) - 1:
            continue
        path.append(part)
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            node = None
    return path


def _model_at(root: type[BaseModel], loc: Sequence[str | int]) -> type[BaseModel] | None:
    """The pydantic model in which the last part of `loc` is a field; None where it cannot be told."""
    types: list[Any] = [root]
    for part in loc[:-1]:
        types = [inner for outer in types for inner in _descend(outer, part)]
    models = [kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models[0] if models else None


def _descend(outer: Any, part: str | int) -> list[Any]:
    if isinstance(outer, type) and issubclass(outer, BaseModel):
        kind = outer.model_fields.get("kind")
        if kind is not None and part in get_args(kind.annotation):
            return [outer]  # the tag of a union selects it
        field = outer.model_fields.get(str(part))
        return _alternatives(field.annotation) if field else []
    return _alternatives(get_args(outer)[-1]) if get_args(outer) else []  # a dict's values, a list's items


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, annotated or not; the annotation itself otherwise."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _alternatives(member)]
    return [annotation]


def suggest(name: str, known: Sequence[str]) -> str:
    """A sentence with the nearest of the known names, else with all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(sorted(known))}." if known else ""
