"""Tables of benchmarks.store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Z95 = 1.96


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy by distance, pooled over seeds, with 95 % Wilson intervals; then bytes."""
    lines = []
    for pattern in dict.fromkeys(record["pattern"] for record in records):
        of_pattern = [record for record in records if record["pattern"] == pattern]
        rows = [row for record in of_pattern for row in record["rows"]]
        distances = sorted({row["distance"] for row in rows})
        seeds = ", ".join(str(record["seed"]) for record in of_pattern)
        lines += [f"### {pattern} (seeds {seeds})", ""]
        heads = [f"{distance:,} tokens" if distance else "0" for distance in distances]
        lines += ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(distances)]
        for how in dict.fromkeys(row["how"] for row in rows):
            cells = [_cell([row for row in rows if (row["how"], row["distance"]) == (how, at)]) for at in distances]
            lines.append(f"| {how} | " + " | ".join(cells) + " |")
        first = of_pattern[0]
        text_bytes = first["setting"]["document_tokens"]
        lines += [
            "",
            f"{first['num_params']:,} parameters. A document takes {first['bytes_per_document']:,.0f} bytes, "
            f"{first['eidetic_bytes']:,} of them its eidetic tokens; it has {text_bytes} tokens.",
            "",
        ]
    return "\n".join(lines)


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    right, asked = sum(row["right"] for row in rows), sum(row["asked"] for row in rows)
    low, high = wilson(right, asked)
    return f"{right / asked:.3f} ({low:.3f} to {high:.3f})"


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share."""
    share, z2 = right / asked, Z95**2
    middle = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z95 / (1 + z2 / asked) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked**2))
    return max(0.0, middle - half), min(1.0, middle + half)
