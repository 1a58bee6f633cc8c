"""Errors that are the user's to mend. The command line prints one screen, no traceback, and exits with 1."""

from __future__ import annotations


class UserError(Exception):
    """What was found, where, what was expected and the next step. A run that raises it is FAILED, not RESUMABLE."""


class ConfigError(UserError):
    """The pipeline file, a preset or an override is wrong; nothing was started or written."""
