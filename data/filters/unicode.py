"""One form of text: canonical Unicode, no control characters."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from pydantic import Field

from data.filters.filter import Filter, Judge

# Control characters but tab, line feed and carriage return; and what only says how to lay text out or marks its start.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u202a-\u202e\u2066-\u2069]")


class Unicode(Filter):
    """Bring text into one form. Leaves no document out, unless nothing is left of it."""

    kind: Literal["unicode"]
    form: Literal["NFC", "NFKC", "none"] = Field(
        "NFC",
        description="Normal form of Unicode. NFC joins letters and their marks. NFKC also replaces ligatures, widths "
        "and the like, and thereby changes text.",
    )
    control_characters: Literal["keep", "remove"] = Field(
        "remove", description="Control characters but tabs and line ends, byte-order marks and marks of direction."
    )

    def judge(self) -> Judge:
        """Change the text."""

        def judge(text: str) -> str:
            if self.form != "none" and not unicodedata.is_normalized(self.form, text):
                text = unicodedata.normalize(self.form, text)
            return _CONTROL.sub("", text) if self.control_characters == "remove" else text

        return judge
