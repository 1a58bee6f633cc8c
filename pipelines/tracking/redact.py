"""Keeps passwords and tokens out of everything that is stored or shown."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

MASK = "***"

_SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("account", "key")}
_TOKEN_OWNERS = {
    "auth",
    "access",
    "api",
    "bearer",
    "hf",
    "hub",
    "refresh",
    "session",
    "tracking",
    "security",
    "id",
    "ray",
}
# "token" alone is also a unit of text here (end_of_document_token), so it needs a word before it that makes it a
# secret.

_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s@?#]+@")
_URL_QUERY = re.compile(r"(?i)([?&](?:[\w-]*(?:token|signature|password|secret|api_?key|access_?key)|sig)=)[^&\s#]+")
_KNOWN_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}\b|\bgh[pousr]_[A-Za-z0-9]{20,}\b|\bA[KS]IA[A-Z0-9]{16}\b|(?i:\bbearer\s+[A-Za-z0-9._~+/-]{8,}=*)"
)
_MIN_SECRET_LENGTH = 8


def redact(value: Any) -> Any:
    """A copy of a JSON-like value in which secrets are replaced by `***`.

    Masked: values under keys that name a secret (`password`, `hf_token`, `api_key`, ...), credentials inside URLs,
    tokens of well-known forms, and any text that holds the value of a secret environment variable of this process.
    """
    return _redact(value, _secrets_of_environment())


def is_secret_name(name: str) -> bool:
    """Whether a field or environment variable of this name holds a secret."""
    words = [word for word in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()) if word]
    if not words:
        return False
    if _SECRET_WORDS & set(words) or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words)):
        return True
    return words[-1] == "token" and (len(words) == 1 or words[-2] in _TOKEN_OWNERS)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: MASK if item not in (None, "") and is_secret_name(str(key)) else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    return _redact_text(value, secrets) if isinstance(value, str) else value


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = _URL_CREDENTIALS.sub(f"{MASK}@", text)
    text = _URL_QUERY.sub(rf"\g<1>{MASK}", text)
    return _KNOWN_TOKENS.sub(MASK, text)


def _secrets_of_environment() -> list[str]:
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _MIN_SECRET_LENGTH}
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)
