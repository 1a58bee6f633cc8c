"""Explanations: what people wrote of a claim's figures, which stands below those figures and no others.

Words do not change when figures do. So the first line of notes/NAME.md has a digest of the tables that it was written
for, and a note of other figures is left out. `--confirm-notes NAME` writes that line.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

NOTES = Path(__file__).parent / "notes"
_FIRST_LINE = re.compile(r"<!-- figures: (\w+) -->\n+")


class Note(NamedTuple):
    """What was written of a claim. `digest`: of the tables that it is about; None: nobody confirmed any."""

    text: str
    digest: str | None


def digest_of(*tables: str) -> str:
    """What tells a claim's figures from others."""
    return hashlib.sha256("\n".join(tables).encode()).hexdigest()[:12]


def read_note(name: str) -> Note | None:
    """The note on a claim; None: there is none."""
    file = _file(name)
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8")
    found = _FIRST_LINE.match(text)
    return Note(text[found.end() :].strip(), found[1]) if found else Note(text.strip(), None)


def is_about(name: str, digest: str) -> bool:
    """Whether the note on a claim was written for the tables of this digest."""
    note = read_note(name)
    return note is not None and note.digest == digest


def confirm(name: str, digest: str) -> Path:
    """Write down that the note on a claim, as it is now, is about the tables of this digest. Returns its file."""
    note, file = read_note(name), _file(name)
    assert note is not None, name
    file.write_text(f"<!-- figures: {digest} -->\n\n{note.text}\n", encoding="utf-8")
    return file


def _file(name: str) -> Path:
    return NOTES / f"{name}.md"
