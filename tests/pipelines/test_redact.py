from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.redact import is_secret_name, redact
from pipelines.tracking.environment import quiet_environment


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
        *("PGPASSWORD", "DB_PASS", "DB_PWD", "MYSQL_PWD", "GITHUB_TOKEN", "NPM_TOKEN", "CI_JOB_TOKEN", "X_TOKEN"),
        *("DATABRICKS_TOKEN", "OPENAI_KEY", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "ENCRYPTION_KEY"),
        *("SLACK_WEBHOOK_URL", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GPG_PASSPHRASE", "privateKey", "AUTH"),
        *("HTTP_AUTHORIZATION", "storage.credentials", "SENTRY_DSN", "DATABASE_URL", "accountKey", "clientSecret"),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "num_tokens",
        "tokens_per_s",
        "end_of_document_token",
        "stop_token",
        "tokenizer",
        "key",
        "keys",
        "num_key_heads",
        "",
    ]
    + [
        "max_tokens",
        "bytes_per_token",
        "tokenizer.max_token_length",
        "special_tokens",
        "passes",
        "text_key",
        "hash_keys",
    ]
    + ["RAY_AUTH_MODE", "SSH_AUTH_SOCK", "compass", "bypass_cache", "author", "KEYBOARD", "PATH", "secretary", "keep"],
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
        ("mysql+pymysql://root:pa/ss@h/db", "mysql+pymysql://***@h/db"),
        ("postgresql://u:p/a?s#s@db/m", "postgresql://***@db/m"),
        ("s3://bucket/a/b and me@example.org", "s3://bucket/a/b and me@example.org"),
        ("hf://datasets/org/name@main/x", "hf://datasets/org/name@main/x"),
        ("http://host:5000/name@main", "http://host:5000/name@main"),
        ("redis://u:p@ss@h/0", "redis://***@h/0"),
        ("AccountName=x;AccountKey=abcd1234==;EndpointSuffix=y", "AccountName=x;AccountKey=***;EndpointSuffix=y"),
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


SECRET = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=24, max_size=40)
SHAPES = [
    *("hf_{}", "ghp_{}", "github_pat_{}", "glpat-{}", "sk-{}", "sk-proj-{}", "xoxb-{}", "npm_{}", "Bearer {}"),
    *("https://u:{}@host/x", "mysql+pymysql://root:a/{}@h", "redis://:{}@h:6379/0", "https://{}@github.com/a/b"),
    *("https://hooks.slack.com/services/T/B/{}", "https://x/y?a=1&api_key={}&b=2", "password={}", "api_key: {}"),
    *("eyJhbGciOiJIUzI1NiJ9.{0}.{0}", "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----"),
]


@given(
    SECRET,
    st.sampled_from(SHAPES),
    st.sampled_from(["{}", "before {} after", "error: '{}'", "({})", 'say "{}", please']),
)
def test_no_secret_of_a_known_shape_survives(secret: str, shape: str, around: str) -> None:
    assert secret not in str(redact({"note": [around.format(shape.format(secret))]}))


@given(SECRET, st.sampled_from(["PGPASSWORD", "DB_PASS", "GITHUB_TOKEN", "OPENAI_KEY", "MY_WEBHOOK", "X_CREDENTIAL"]))
def test_the_value_of_a_secret_variable_is_masked_wherever_it_appears(secret: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        assert secret not in str(redact({"a": f"x{secret}y", "b": [f"/path/{secret}"], name: secret}))


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_configurations_are_untouched(path: Path) -> None:
    from pipelines.loading import load_pipeline

    config = load_pipeline(path, ()).model_dump(mode="json")
    assert redact(config) == config
