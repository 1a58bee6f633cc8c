"""Durations and sizes in units of readable size."""

from __future__ import annotations


def in_words(seconds: float) -> str:
    """A duration: `3.2 h`."""
    if seconds > 100 * 365 * 86400:
        return "more than 100 years"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{max(1, seconds):.0f} s"


def size(num_bytes: float) -> str:
    """Bytes: `3.2 GiB`."""
    for unit, length in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= length:
            return f"{num_bytes / length:,.1f} {unit}" if length > 2**20 else f"{num_bytes / length:,.0f} {unit}"
    return f"{num_bytes / 1024:,.0f} KiB" if num_bytes else "0"


def number(value: float) -> str:
    """A count: `116.2 M`."""
    for unit, length in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= length:
            return f"{value / length:,.2f} {unit}"
    return f"{value:,.0f}"
