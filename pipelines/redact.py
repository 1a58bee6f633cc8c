"""Keeps passwords and tokens out of everything that is stored or shown."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

MASK = "***"

_SECRET_WORDS = {
    *("password", "passwords", "passwd", "passphrase", "pass", "pwd", "pw"),
    *("secret", "secrets", "credential", "credentials", "creds"),
    *("apikey", "authkey", "webhook", "auth", "authorization", "bearer", "dsn", "pat", "cookie"),
}
_SECRET_ENDINGS = ("password", "passwd", "passphrase", "secret", "apikey", "credentials")  # PGPASSWORD, MYSECRET
_SECRET_PAIRS = {
    *(("connection", "string"), ("conn", "str"), ("connection", "uri"), ("database", "url"), ("redis", "url")),
    *(("sas", "token"), ("webhook", "url")),
}
_HARMLESS_LAST = {"mode", "type", "method", "enabled", "file", "path", "dir", "sock", "host", "port", "version", "cls"}
# RAY_AUTH_MODE, SSH_AUTH_SOCK, GOOGLE_..._CREDENTIALS as a path: says how or where, not what.
_KEY_IS_HARMLESS_AFTER = {
    *("num", "n", "primary", "foreign", "sort", "partition", "cache", "field", "text", "id", "dict", "json", "slot"),
    *("query", "eidetic", "column", "group", "map", "hot", "index", "metric"),
}
_TOKEN_IS_TEXT_AFTER = {
    *("document", "stop", "start", "end", "eod", "eos", "bos", "pad", "unk", "mask", "sep", "cls", "special", "added"),
    *(
        "per",
        "next",
        "last",
        "first",
        "image",
        "begin",
        "beginning",
        "sentence",
        "prefix",
        "suffix",
        "new",
        "of",
        "max",
    ),
    *("min", "num", "extra", "byte", "text", "model", "fim", "boundary"),
}
# "token" is also a unit of text here: end_of_document_token and per_token are no secrets, GITHUB_TOKEN is one.

_URL_CREDENTIALS = re.compile(  # a password may hold a slash; PORT/path@revision is none
    r"(?<=://)(?:[^\s/@?#:]*:(?!\d+[/?#])[^\s\"'<>]*|[^\s/@?#]+)@(?=[\w.\[*-])"
)
_URL_QUERY = re.compile(
    r"(?i)([?&;](?:[\w-]*(?:token|signature|password|passwd|pwd|secret|api_?key|access_?key|account_?key)|sig|key)=)"
    r"[^&\s#;]+"
)
_ASSIGNMENT = re.compile(
    r"(?i)(\b(?:account_?key|shared_?access_?(?:key|signature)|password|passwd|pwd|secret(?:_?access)?(?:_?key)?|api_?key)"
    r"\s*[=:]\s*)[^\s;,\"'&]{4,}"
)
_KNOWN_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{16,}\b|\bgithub_pat_[A-Za-z0-9_]{20,}\b|\bglpat-[A-Za-z0-9_-]{16,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}|\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}\b"
    r"|\bA[KS]IA[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}"
    r"|\bxox[a-z]-[A-Za-z0-9-]{10,}|\bxapp-[A-Za-z0-9-]{10,}|\bnpm_[A-Za-z0-9]{20,}\b|\bpypi-[A-Za-z0-9_-]{20,}"
    r"|\bdapi[a-f0-9]{32}\b"
    r"|https://hooks\.slack\.com/[^\s\"']+|https://discord(?:app)?\.com/api/webhooks/[^\s\"']+"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"  # a JSON web token
    r"|(?i:\b(?:bearer|basic)\s+[A-Za-z0-9._~+/-]{8,}=*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
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
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", spaced) if word]
    if not words or words[-1] in _HARMLESS_LAST:
        return False
    if _SECRET_WORDS & set(words) or any(word.endswith(_SECRET_ENDINGS) for word in words):
        return True
    if any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words)):
        return True
    before = words[-2] if len(words) > 1 else None
    if words[-1] == "token":
        return before not in _TOKEN_IS_TEXT_AFTER
    return words[-1] == "key" and before is not None and before not in _KEY_IS_HARMLESS_AFTER


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: MASK if item not in (None, "", True, False) and is_secret_name(str(key)) else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    return _redact_text(value, secrets) if isinstance(value, str) else value


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = _URL_CREDENTIALS.sub(f"{MASK}@", text)
    text = _ASSIGNMENT.sub(rf"\g<1>{MASK}", text)
    text = _URL_QUERY.sub(rf"\g<1>{MASK}", text)
    return _KNOWN_TOKENS.sub(MASK, text)


def _secrets_of_environment() -> list[str]:
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _MIN_SECRET_LENGTH}
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)
