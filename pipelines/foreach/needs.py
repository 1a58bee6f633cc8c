"""What `needs` may say of a template: `train`, `train[*]`, `train[model=swa-130m]`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import FieldError

PATTERN = r"^[^\[\]]+(\[[^\[\]]+\])?$"
"""The form of an entry, for JSON schemas."""
_BRACKETS = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Need:
    """One entry of `needs`."""

    text: str
    where: tuple[str, ...]  # its list or role, from the top of the pipeline file
    stage: str
    gathered: Mapping[str, str] | None  # None: the copy that fits; else those with these values, with {} all of them


def needs_of(stage: str, needs: Any) -> list[Need]:
    """The entries of a stage's `needs`. Raises as replace_needs()."""
    found: list[Need] = []

    def note(need: Need) -> Sequence[str]:
        found.append(need)
        return ()

    replace_needs(stage, needs, note)
    return found


def replace_needs(stage: str, needs: Any, names: Callable[[Need], Sequence[str]]) -> Any:
    """The `needs` of a stage with names in place of each entry, a list or by role as before.

    What is no text stays for validation to refuse. Raises: FieldError: an entry has brackets and another form.
    """

    def replaced(entries: Any, where: tuple[str, ...]) -> Any:
        if isinstance(entries, str):
            found = names(_read(entries, where))
            return found[0] if len(found) == 1 else list(found)
        if not isinstance(entries, list):
            return entries
        texts = ([entry] if not isinstance(entry, str) else names(_read(entry, where)) for entry in entries)
        return [name for found in texts for name in found]

    where = ("stages", stage, "needs")
    if isinstance(needs, dict):
        return {role: replaced(entries, (*where, role)) for role, entries in needs.items()}
    return replaced(needs, where) if isinstance(needs, list) else needs


def _read(text: str, where: tuple[str, ...]) -> Need:
    if "[" not in text and "]" not in text:
        return Need(text, where, text, None)
    found = _BRACKETS.fullmatch(text)
    if found is None:
        raise _other_form(text, where)
    stage, inside = found.groups()
    gathered: dict[str, str] = {}
    for choice in () if inside.strip() == "*" else inside.split(","):
        field, equals, name = (part.strip() for part in choice.partition("="))
        if not (field and equals and name) or field in gathered:
            raise _other_form(text, where)
        gathered[field] = name
    return Need(text, where, stage, gathered)


def _other_form(text: str, where: tuple[str, ...]) -> FieldError:
    return FieldError(
        where,
        f"found {text!r}. Expected STAGE for the copy that fits, STAGE[*] for all copies, or STAGE[FIELD=VALUE, ...] "
        "for those with these values.",
    )
