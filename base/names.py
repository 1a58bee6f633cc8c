"""Names that a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def close_names(name: str, known: Sequence[str]) -> list[str]:
    """The known names nearest to `name`, if any is near."""
    near = difflib.get_close_matches(name, known, n=3)
    scores = [difflib.SequenceMatcher(None, name, other).ratio() for other in near]
    return [other for other, score in zip(near, scores, strict=True) if score > scores[0] - 0.1]


def did_you_mean(names: Sequence[str]) -> str:
    """` Did you mean 'x' or 'y'?`; empty without names."""
    return f" Did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


def suggest(name: str, known: Sequence[str]) -> str:
    """A sentence with the nearest of the known names, else with all of them."""
    if near := close_names(name, known):
        return did_you_mean(near)
    return f" Known: {', '.join(sorted(known))}." if known else ""
