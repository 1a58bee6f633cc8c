from __future__ import annotations

import pytest

from pipelines.tracking.environment import quiet_environment
from pipelines.tracking.redact import is_secret_name, redact


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "db.PASSWORD",
        "hf_token",
        "HF_TOKEN",
        "token",
        "awsSecretAccessKey",
        "api_key",
        "apiKey",
        "RAY_AUTH_TOKEN",
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["num_tokens", "tokens_per_s", "end_of_document_token", "stop_token", "tokenizer", "key", "num_key_heads", ""],
)
def test_the_fields_own_words_are_not_secrets(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://u:p%40@db/m", "postgresql://***@db/m"),
        ("s3://bucket/a?x=1&X-Amz-Signature=abc&y=2", "s3://bucket/a?x=1&X-Amz-Signature=***&y=2"),
        ("Bearer abcdefgh12345", "***"),
        ("key AKIAABCDEFGHIJKLMNOP here", "key *** here"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_secrets_inside_text_are_masked(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_structure_is_kept() -> None:
    value = {"a": [1, None, True, {"token": "x", "n": 2.5}], "b": ("y",), "password": None}
    assert redact(value) == {"a": [1, None, True, {"token": "***", "n": 2.5}], "b": ["y"], "password": None}


def test_the_quiet_environment_respects_what_the_user_set() -> None:
    environ = {"MLFLOW_RUN_ID": "x", "MLFLOW_HTTP_REQUEST_TIMEOUT": "99"}
    quiet_environment(environ)
    assert "MLFLOW_RUN_ID" not in environ
    assert environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
    assert environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
