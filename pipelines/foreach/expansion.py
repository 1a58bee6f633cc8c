"""From templates to their copies: names, values, and which copy reads which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from base.names import suggest
from pipelines.config import STAGE_NAMES, is_stage_name
from pipelines.config_errors import FieldOrigins
from pipelines.engine.graph import topological_order
from pipelines.errors import FieldError
from pipelines.foreach.needs import Need, needs_of, replace_needs
from pipelines.foreach.values import ForeachField, Placed, Value, clean_name, place, read_foreach, replaces, written_as

MAX_COPIES = 1000  # of one stage


@dataclass(frozen=True)
class Template:
    """A stage as it is written. One without fields has one copy, which has its name."""

    name: str
    settings: Mapping[str, Any]  # without `foreach`
    own: tuple[ForeachField, ...]  # of its `foreach`
    fields: tuple[ForeachField, ...]  # of the stages that it needs, then its own

    @property
    def where(self) -> tuple[str, ...]:
        """Where it is written why there are copies, from the top of the file."""
        return ("stages", self.name, "foreach" if self.own else "needs")


@dataclass(frozen=True)
class Copy:
    """One stage of the pipeline."""

    name: str
    template: Template
    values: Mapping[ForeachField, Value]  # of every field of the template

    @property
    def placed(self) -> list[Placed]:
        """The values of its own fields, the shallowest field first."""
        placed = (one for field in self.template.own for one in field.placed(self.values[field]))
        return sorted(placed, key=lambda one: len(one.parts))

    def written(self, path: tuple[str | int, ...]) -> tuple[str, ...]:
        """Where the file says what this copy has at `path` within it, from the top of the file."""
        inner = written_as(self.template.settings, reversed(self.placed), path)
        return ("stages", self.template.name, *inner)

    def agrees(self, values: Mapping[ForeachField, Value]) -> bool:
        """Whether it has these values in those of the fields that it has at all."""
        return all(values.get(field, value) is value for field, value in self.values.items())


Copies = Mapping[str, Sequence[Copy]]
"""The copies of each stage, by the stage's name."""


def expand_foreach(raw: dict[str, Any], origins: FieldOrigins) -> dict[str, Any]:
    """A parsed pipeline file with its copies in place of the templates; `origins` learns where they are written.

    Raises: FieldError: something is wrong with a `foreach`, or with what `needs` says of a template.
    """
    stages = raw.get("stages")
    if not isinstance(stages, dict) or not _has_templates(stages):
        return raw
    copies = _copies_of(stages)
    _check_needs(stages, copies)
    _check_names(stages, copies)
    expanded: dict[str, Any] = {}
    for name, stage in stages.items():
        if name not in copies:  # no mapping, which validation refuses
            expanded[name] = stage
            continue
        _check_overrides(copies[name], origins)
        for copy in copies[name]:
            expanded[copy.name] = _settings_of(copy, copies)
    origins.add_copies({copy.name: copy.written for found in copies.values() for copy in found if copy.values})
    return {**raw, "stages": expanded}


def template_of(stages: Any, name: str) -> str | None:
    """The stage that has a copy of this name; None: there is none."""
    try:
        copies = _copies_of(stages) if isinstance(stages, dict) else {}
    except FieldError:
        return None
    return next((copy.template.name for found in copies.values() for copy in found if copy.name == name), None)


def _has_templates(stages: Mapping[str, Any]) -> bool:
    return any(
        "foreach" in stage or any(need.gathered is not None for need in needs_of(name, stage.get("needs")))
        for name, stage in stages.items()
        if isinstance(stage, dict)
    )


def _copies_of(stages: Mapping[str, Any]) -> dict[str, list[Copy]]:
    """The copies of every stage that is a mapping, in the order of its values, the last field changing first.

    Raises: FieldError: a `foreach` is wrong, there are too many copies, or the stages wait for one another.
    """
    mappings = {name: stage for name, stage in stages.items() if isinstance(stage, dict)}
    needs = {name: needs_of(name, stage.get("needs")) for name, stage in mappings.items()}
    templates: dict[str, Template] = {}
    for name in topological_order({name: _known(found, mappings) for name, found in needs.items()}):
        settings = dict(mappings[name])
        own = read_foreach(name, settings.pop("foreach")) if "foreach" in settings else ()
        along = _known([need for need in needs[name] if need.gathered is None], mappings)
        fields = (*(field for needed in along for field in templates[needed].fields), *own)
        templates[name] = Template(name, settings, own, tuple(dict.fromkeys(fields)))
    return {name: _copies(templates[name]) for name in mappings}


def _known(needs: Sequence[Need], stages: Mapping[str, Any]) -> list[str]:
    """The stages that are needed and exist, each once."""
    return list(dict.fromkeys(need.stage for need in needs if need.stage in stages))


def _copies(template: Template) -> list[Copy]:
    fields = template.fields
    if (count := math.prod(len(field.values) for field in fields)) > MAX_COPIES:
        factors = " x ".join(f"{len(field.values)} of {field.path}" for field in fields)
        raise FieldError(
            template.where,
            f"the values ({factors}) make {count} copies of {template.name!r}, expected at most {MAX_COPIES}. Leave "
            "out some values, or write several pipelines.",
        )
    found = []
    for values in product(*(field.values for field in fields)):
        name = "-".join((template.name, *(value.name for value in values)))
        found.append(Copy(name, template, dict(zip(fields, values, strict=True))))
    return found


def _check_needs(stages: Mapping[str, Any], copies: Copies) -> None:
    """Raises: FieldError: a stage is needed that is not in the file."""
    for name in copies:
        for need in needs_of(name, stages[name].get("needs")):
            if need.stage in stages:
                continue
            for copy in (copy for found in copies.values() for copy in found if copy.name == need.stage):
                values = ", ".join(f"{field.path}={value.name}" for field, value in copy.values.items())
                template = copy.template.name
                raise FieldError(
                    need.where,
                    f"{need.stage!r} is a copy of {template!r}. Write {template}[{values}], or {template}[*] for all "
                    "copies.",
                )
            raise FieldError(
                need.where, f"there is no stage {need.stage!r} in this pipeline. Its stages: {', '.join(stages)}."
            )


def _check_names(stages: Mapping[str, Any], copies: Copies) -> None:
    """Raises: FieldError: a copy's name cannot be that of a stage, or is that of another one."""
    named: dict[str, Copy] = {}
    for copy in (copy for found in copies.values() for copy in found if copy.values):
        field = copy.template.fields[-1]
        advice = f"name the values of {field.stage}: foreach: {{{field.path}: {{NAME: VALUE, ...}}}}."
        if not is_stage_name(copy.name):
            raise FieldError(
                copy.template.where,
                f"a copy would have the name {copy.name!r} ({len(copy.name)} characters). {STAGE_NAMES} You may "
                f"{advice}",
            )
        if copy.name in stages or copy.name in named:
            other = f"a copy of {named[copy.name].template.name!r}" if copy.name in named else "another stage"
            raise FieldError(
                copy.template.where,
                f"a copy would have the name {copy.name!r}, which {other} has. Rename a stage, or {advice}",
            )
        named[copy.name] = copy


def _check_overrides(copies: Sequence[Copy], origins: FieldOrigins) -> None:
    """Refuse an override without effect: every copy has another value there. Raises: FieldError: names the other."""
    template = copies[0].template
    for keys in origins.overridden(("stages", template.name)):
        for field in template.own:
            if all(_replaces(template, field.placed(value), keys[2:]) for value in field.values):
                instead = ".".join((template.name, *field.where[2:]))
                raise FieldError(
                    keys, f"no effect: every copy of {template.name!r} has a value of `foreach` here. Set {instead}."
                )


def _replaces(template: Template, placed: Sequence[Placed], path: tuple[str, ...]) -> bool:
    return any(replaces(template.settings, one, path) for one in placed)


def _settings_of(copy: Copy, copies: Copies) -> dict[str, Any]:
    settings = place(copy.template.settings, copy.placed)
    if "needs" in settings:
        names = partial(_names_read, copy, copies)
        settings["needs"] = replace_needs(copy.template.name, settings["needs"], names)
    return settings


def _names_read(copy: Copy, copies: Copies, need: Need) -> list[str]:
    """The names of the stages that a copy reads through one entry of `needs`."""
    if need.stage not in copies:  # no mapping, which validation refuses
        return [need.stage]
    candidates = [other for other in copies[need.stage] if other.agrees(copy.values)]
    if need.gathered is None:
        return [other.name for other in candidates]
    template = copies[need.stage][0].template
    if not template.fields:
        raise FieldError(
            need.where,
            f"{need.text!r}: {need.stage!r} has no copies, since neither it nor a stage that it needs has `foreach`. "
            f"Write {need.stage}.",
        )
    gathered = dict(_value_named(need, template, field, name) for field, name in need.gathered.items())
    if len(gathered) < len(need.gathered):
        raise FieldError(need.where, f"{need.text!r} names a field twice. Name each once.")
    found = [other.name for other in candidates if other.agrees(gathered)]
    if not found:
        raise FieldError(need.where, f"{need.text!r} has no copy with the values of {copy.name!r}. Leave these out.")
    return found


def _value_named(need: Need, template: Template, field_name: str, value_name: str) -> tuple[ForeachField, Value]:
    fields = [field for field in template.fields if field_name in (field.path, f"{field.stage}.{field.path}")]
    if len(fields) != 1:
        known = [f"{field.stage}.{field.path}" for field in template.fields]
        problem = "may be" if fields else "is no field of its copies. These are"
        listed = " or ".join(f"{field.stage}.{field.path}" for field in fields) or ", ".join(known)
        raise FieldError(need.where, f"{need.text!r}: {field_name!r} {problem} {listed}.")
    values = {value.name: value for value in fields[0].values}
    name = clean_name(value_name)
    if name not in values:
        raise FieldError(
            need.where, f"{need.text!r}: no value {value_name!r} of {field_name}.{suggest(value_name, list(values))}"
        )
    return fields[0], values[name]
