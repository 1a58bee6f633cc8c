"""Errors about the user's data."""

from __future__ import annotations

from base.errors import UserError


class DataError(UserError, ValueError):
    """The text, the shards or a tokenizer's files are not as they should be.

    The message names the file, the line or byte, the field, what was expected and the next step. A ValueError, so that
    pydantic's validators may raise it.
    """


class SourceUnavailableError(Exception):
    """What serves the text cannot be reached or is busy: nothing is wrong with the data, and trying later may do."""
