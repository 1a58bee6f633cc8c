"""Errors that are the user's to fix, wherever they arise."""

from __future__ import annotations


class UserError(Exception):
    """What was found, where, what was expected and the next step."""


class DamagedError(UserError):
    """A file's content does not match its digest. The message names the file and how to have it made again."""
