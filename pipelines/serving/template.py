"""Conversations as text that a base model continues: one line per speaker.

    <system text>

    User: <what the user says>
    Assistant: <the answer>
    User: ...

The answer ends where the model lets the user speak again.
"""

from __future__ import annotations

from collections.abc import Iterable

STOPS = ("\nUser:", "\nAssistant:")
_NAMES = {"user": "User", "assistant": "Assistant"}


def as_text(messages: Iterable[tuple[str, str]], continues: bool = False) -> str:
    """The text up to the answer.

    Args:
        messages: (role, content): system or developer, user, assistant.
        continues: whether something was said before, so that a line must end first.
    """
    parts = ["\n"] if continues else []
    for role, content in messages:
        parts.append(f"{_NAMES[role]}: {content}\n" if role in _NAMES else f"{content}\n\n")
    return "".join(parts) + "Assistant:"
