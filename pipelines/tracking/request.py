"""What the process of a stage asks of its workers. Light to import."""

from __future__ import annotations

from enum import StrEnum


class Request(StrEnum):
    """What workers are asked to do."""

    NONE = "none"
    STOP = "stop"  # save, and end; no other request undoes it
    GROW = "grow"  # save, and end, so that more of them can go on
