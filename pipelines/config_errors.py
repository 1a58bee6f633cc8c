"""What is wrong in a pipeline file, in that file's words: override or line, field as written, likely remedy."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from base.names import close_names, did_you_mean
from pipelines.engine.stage import StageConfig
from pipelines.errors import FieldError

MAX_ERRORS_SHOWN = 6

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 3, 4, 70, 70

_EXPECTED = {  # pydantic's type of an error -> what was expected; {} are fields of its context
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of names to values",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer of a reasonable size",
    "int_type": "an integer",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list, such as [a, b]",
    "literal_error": "{expected}",
    "model_attributes_type": "a mapping of fields",
    "model_type": "a mapping of fields",
    "recursion_loop": "a value that does not contain itself",
    "needs_type": "a list, such as [a, b]. A mapping of roles will do, too: {{role: a}}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_type": "text (in quotes, if it looks like a number)",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "tuple_type": "a list, such as [a, b]",
}


FieldPath = tuple[str | int, ...]


class FieldOrigins:
    """Where the fields of a pipeline come from: an override, or a line of the file.

    Its methods take paths as the file has them, and also those within copies of a stage (pipelines.foreach).
    """

    def __init__(self, file: str, root: yaml.Node | None = None) -> None:
        self.file = file
        self._root = root
        self._overrides: list[tuple[tuple[str, ...], str]] = []
        self._copies: dict[str, Callable[[FieldPath], FieldPath]] = {}

    def add_override(self, keys: Sequence[str], text: str) -> None:
        """Note that `text` set the field at `keys`."""
        self._overrides.append((tuple(keys), text))

    def overridden(self, within: Sequence[str]) -> list[tuple[str, ...]]:
        """The fields that overrides set, of those whose path begins so."""
        return [keys for keys, _ in self._overrides if keys[: len(within)] == tuple(within)]

    def add_copies(self, written: Mapping[str, Callable[[FieldPath], FieldPath]]) -> None:
        """Note where copies of stages are written: for each copy's name, a path of the file for one within the copy."""
        self._copies.update(written)

    def written(self, field_path: Sequence[str | int]) -> FieldPath:
        """The path of a field as the file has it."""
        path = tuple(field_path)
        copy = self._copies.get(str(path[1])) if path[:1] == ("stages",) and path[1:] else None
        return path if copy is None else copy(path[2:])

    def copies_beside(self, name: str) -> list[str]:
        """The copies of the stage of which `name` is one, that one too; none if it is no copy."""
        written = {copy: path(()) for copy, path in self._copies.items()}
        return [copy for copy, path in written.items() if path == written.get(name)]

    def describe(self, field_path: Sequence[str | int], problem: str) -> str:
        """One line: where the field comes from, its path, the problem."""
        where = ".".join(map(str, self.written(field_path)))
        return f"{self.of(field_path, problem)}: {where + ': ' if where else ''}{problem}"

    def of(self, field_path: Sequence[str | int], problem: str = "") -> str:
        """The override that set the field; else one that set a part of it which `problem` names; else file and line."""
        path = tuple(str(part) for part in self.written(field_path))
        for keys, text in reversed(self._overrides):
            if path[: len(keys)] == keys:
                return f"override {text!r}"
        for keys, text in reversed(self._overrides):
            named = keys[-1].isdecimal() or re.search(rf"(?<!\w){re.escape(keys[-1])}(?!\w)", problem)
            if named and keys[: len(path)] == path:
                return f"override {text!r}"
        line = self._line(path)
        return f"{self.file}:{line}" if line else self.file

    def _line(self, field_path: Sequence[str]) -> int | None:
        """Line (from 1) of the deepest part of the path that is in the file."""
        node, line = self._root, None
        for part in field_path:
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in _pairs(node) if pair[0].value == part), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
                node = node.value[int(part)]
                line = node.start_mark.line + 1
            else:
                break
        return line


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    return iter(node.value)


class _Mistake(NamedTuple):
    path: FieldPath
    problem: str
    known: Sequence[str] = ()  # the keys beside an unknown one, if it is like none of them


def describe_errors(error: ValidationError, root: type[BaseModel], origins: FieldOrigins) -> str:
    """One line per mistake: override or file and line, field, what was found, what was expected."""
    found: dict[tuple[FieldPath, str], list[_Mistake]] = {}  # a mistake of the file, in each copy that has it
    for item in error.errors():
        mistake = _mistake(item, root)
        path = origins.written(mistake.path)
        if item["type"] == "extra_forbidden" and path[2:3] == ("foreach",) and len(path) == 5:
            path = path[:-1]  # the field is unknown, whatever its value
        found.setdefault((path, mistake.problem), []).append(mistake)
    lines: list[str] = []
    known: dict[str, Sequence[str]] = {}
    for (path, problem), mistakes in list(found.items())[:MAX_ERRORS_SHOWN]:
        lines.append(origins.describe(path, problem) + _some_copies(path, mistakes, origins))
        if mistakes[0].known:
            above = origins.written(mistakes[0].path[:-1])
            known[".".join(map(str, above)) or "the pipeline"] = mistakes[0].known
    if len(found) > MAX_ERRORS_SHOWN:
        lines.append(f"... and {len(found) - MAX_ERRORS_SHOWN} more.")
    lines += [f"Known keys of {where}: {', '.join(keys)}." for where, keys in known.items()]
    return "\n".join(lines)


def _mistake(item: Any, root: type[BaseModel]) -> _Mistake:
    path, model, field = _resolve(root, item["loc"])
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return _Mistake(cause.field, cause.problem)
    if item["type"] == "extra_forbidden":
        guesses = _similar_fields(str(path[-1]), model)
        known = () if guesses or model is None else sorted(_keys(model))
        return _Mistake(tuple(path), f"unknown key.{did_you_mean(guesses)}", known)
    return _Mistake(tuple(path), _explain(item, field))


def _some_copies(path: FieldPath, mistakes: Sequence[_Mistake], origins: FieldOrigins) -> str:
    """The copies of a stage that have a mistake, if others do not and the path does not tell."""
    names = list(dict.fromkeys(str(mistake.path[1]) for mistake in mistakes if mistake.path != path))
    if not names or path[2:3] == ("foreach",) or len(names) == len(origins.copies_beside(names[0])):
        return ""
    return f" (In {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}.)"


def _explain(item: Any, field: FieldInfo | None) -> str:
    kind, context, found = item["type"], item.get("ctx", {}), shown(item["input"])
    if kind == "missing":
        return "this field is required and missing."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_kind(item["input"], field)
    if kind == "value_error":
        return str(item["msg"]).removeprefix("Value error, ")
    if kind == "string_pattern_mismatch" and field is not None and field.description:
        return f"found {found}, which has another form. {field.description}"
    if kind in _EXPECTED:
        return f"found {found}, expected {_EXPECTED[kind].format_map(context)}."
    return f"found {found}. {item['msg']}."


def _explain_kind(value: Any, field: FieldInfo | None) -> str:
    kinds = _kinds(field.annotation) if field is not None else []
    listed = ", ".join(kinds)
    if not isinstance(value, Mapping):
        return f"found {shown(value)}, expected a mapping with a `kind` (one of {listed})."
    if value.get("kind") is None:
        return f"`kind` is missing. It is one of {listed}."
    found = str(value["kind"])
    return f"found kind {found!r}, expected one of {listed}.{did_you_mean(close_names(found, kinds)[:1])}"


def shown(value: Any) -> str:
    """A value as YAML writes it, cut to a readable length."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _SHORT.repr(value)


def _resolve(root: type[BaseModel], loc: Sequence[str | int]) -> tuple[list[str | int], type[BaseModel] | None, Any]:
    """Follow pydantic's location through the types.

    Returns: the path as the user wrote it, without the tags of unions that pydantic puts in; the model in which its
        last part is, if it is in one; and that field's description, or the one of a container's values.
    """
    path: list[str | int] = []
    field = FieldInfo(annotation=root)
    model: type[BaseModel] | None = None
    for part in loc:
        member = None if field.discriminator is None else _member(field.annotation, part)
        if member is not None:
            field = FieldInfo(annotation=member)
            continue
        if part == "[key]":
            continue
        path.append(part)
        model, field = _enter(field.annotation, part)
    return path, model, field


def _enter(annotation: Any, part: str | int) -> tuple[type[BaseModel] | None, FieldInfo]:
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind, _unwrapped(kind.model_fields.get(str(part), FieldInfo(annotation=None)))
        if entries := [inner for inner in get_args(kind) if inner is not Ellipsis]:  # a dict's values, a list's entries
            return None, _unwrapped(FieldInfo.from_annotation(entries[-1]))
    return None, FieldInfo(annotation=None)


def _unwrapped(field: FieldInfo) -> FieldInfo:
    """`Annotated[A | B, Field(discriminator=...)] | None` as `A | B` with its discriminator."""
    members = [member for member in get_args(field.annotation) if member is not type(None)]
    if field.discriminator is None and len(members) == 1 and get_origin(members[0]) is Annotated:
        return FieldInfo.from_annotation(members[0])
    return field


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, annotated or not; the annotation itself otherwise."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _alternatives(member)]
    return [annotation]


def _kinds(annotation: Any) -> list[str]:
    """The kinds between which a union of models chooses."""
    models = [kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    fields = [model.model_fields.get("kind") for model in models]
    return [str(value) for field in fields if field is not None for value in get_args(field.annotation)]


def _member(annotation: Any, tag: str | int) -> Any:
    """The member of a union that pydantic's tag names: a kind, or the type of a list. None: it names no member."""
    for member in _alternatives(annotation):
        if tag in _kinds(member) or tag == getattr(get_origin(member), "__name__", None):
            return member
    return None


def _similar_fields(key: str, model: type[BaseModel] | None) -> list[str]:
    """Fields that `key` may stand for: of that name one level down, else of nearly that name, else described so."""
    if model is None:
        return []
    if inside := [f"{name}.{key}" for name, field in model.model_fields.items() if _has_field(field.annotation, key)]:
        return inside
    if near := close_names(key, _keys(model)):
        return near
    words = [word for word in re.split(r"[_\W]+", key.lower()) if word]
    if sum(map(len, words)) < 4:
        return []
    pattern = re.compile(r"\b" + r"\W+".join(map(re.escape, words)) + r"s?\b")
    return [name for name, field in model.model_fields.items() if pattern.search((field.description or "").lower())][:3]


def _keys(model: type[BaseModel]) -> list[str]:
    """What a file may say of it: the fields, and of a stage `foreach`, which is gone when the fields are read."""
    return [*model.model_fields, *(["foreach"] if issubclass(model, StageConfig) else ())]


def _has_field(annotation: Any, key: str) -> bool:
    models = (kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return any(key in model.model_fields for model in models)
