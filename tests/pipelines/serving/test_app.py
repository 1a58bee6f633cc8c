"""What the endpoints take and refuse, in process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

with warnings.catch_warnings(action="ignore"):  # it would rather have httpx2
    from starlette.testclient import TestClient

from base.errors import UserError
from pipelines.serving import app as app_module
from pipelines.serving.app import make_app
from pipelines.serving.engine import Engine, Limits
from pipelines.serving.guard import API_KEY, host_name, key_for
from pipelines.serving.metrics import Metrics
from pipelines.serving.service import Service
from pipelines.serving.states import StateStore
from tests.pipelines.serving.engines import TOKENIZER
from tests.pipelines.stages.trained_run import TEXT, tiny_model

DEF = {"prompt": "def", "max_tokens": 6, "seed": 1, "ignore_eos": True}


def client_of(folder: Path, pattern: str = "bmojo,mamba2", context_tokens: int = 100) -> TestClient:
    model, metrics = tiny_model(pattern), Metrics()
    engine = Engine(model, TOKENIZER, Limits(4, 8, 16, context_tokens), metrics)
    metrics.watch(engine.load)
    store = StateStore(folder, "run/train", "d" * 64, model.init_state(1))
    service = Service("run/train", engine, TOKENIZER, store, metrics, max_tokens=1000)
    return TestClient(make_app(service, "127.0.0.1", None), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client_of(tmp_path_factory.mktemp("states")) as client:
        yield client


def completed(client: TestClient, **fields: Any) -> Any:
    response = client.post("/v1/completions", json={**DEF, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: TestClient, path: str = "/v1/completions", **fields: Any) -> tuple[int, dict[str, Any]]:
    response = client.post(path, json=fields)
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokns": 3}, "max_tokns", "Unknown field 'max_tokns'. Did you mean 'max_tokens'?"),
        ({"prompt": [1, "a"]}, "prompt", "prompt: expected a text, a list of texts, a list of token ids"),
        ({"prompt": []}, None, "prompt is empty"),
        ({"prompt": ["a", []]}, "prompt", "prompt: expected"),
        ({"prompt": [300]}, "prompt", "There is no token 300: ids are below 300."),
        ({"prompt": [-1]}, "prompt", "prompt: expected"),
        ({"prompt": "\ud800"}, "prompt", "The prompt cannot be encoded"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": 0}, "top_k", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": 2.5}, "n", "valid integer"),
        ({"n": 100, "prompt": ["a", "b"]}, None, "2 prompts times n=100 are over 128 answers"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"stop": ""}, "stop", "stop: expected a text, or a list of them"),
        ({"max_tokens": 1001}, "max_tokens", "this server draws at most 1000"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"presence_penalty": 0.5}, "presence_penalty", "Input should be 0"),
        ({"best_of": 3}, None, "best_of=3 is not supported"),
        ({"suffix": "x"}, "suffix", "Input should be ''"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options needs stream: true"),
        ({"state": "../x"}, "state", "state: expected the id of a state"),
        ({"save_state": "a b"}, "save_state", "save_state: expected an id"),
        ({"save_state": "a", "n": 2}, None, "save_state needs n=1, not 2"),
        ({"save_state": "a", "prompt": ["a", "b"]}, None, "save_state needs one prompt, not 2"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_with_the_reason(
    client: TestClient, fields: dict[str, Any], param: str | None, message: str
) -> None:
    body = json_of({**DEF, **fields})
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def json_of(body: dict[str, Any]) -> bytes:
    """JSON in ASCII, which can hold half a surrogate pair."""
    return json.dumps(body).encode()


def test_other_refusals(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(client, model="gpt-5", **DEF)[1]["code"] == "model_not_found"
    assert refused(client, state="nothing", **DEF)[0] == 404
    assert client.post("/v1/completions", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    broken = client.post("/v1/completions", content="{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400
    assert "not JSON" in broken.json()["error"]["message"]
    assert client.post("/v1/completions", json=[1]).status_code == 400
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/v1/nothing").json()["error"]["message"].startswith("Not Found")
    monkeypatch.setattr(app_module, "MAX_BODY_BYTES", 100)
    assert refused(client, prompt="x" * 100)[0] == 413


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "max_tokens", "n", "stop", "seed", "top_p", "stream", "logprobs", "state", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-2, 40) | st.floats(-1, 2) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_no_body_is_a_failure_of_the_server(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post("/v1/completions", content=json_of({**body}), headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text


def test_an_answer_has_what_it_was_asked_for(client: TestClient) -> None:
    body = completed(client, prompt=["def", "x ="], n=2, echo=True, logprobs=2, return_token_ids=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for choice in body["choices"]:
        assert choice["text"].startswith(("def", "x =")[choice["index"] // 2])
        assert len(choice["token_ids"]) == 6
        logprobs = choice["logprobs"]
        num_prompt = len(TOKENIZER.encode_batch([("def", "x =")[choice["index"] // 2]])[0])
        assert {len(values) for values in logprobs.values()} == {num_prompt + 6}
        assert all(value < 0 for value in logprobs["token_logprobs"])
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    num_read = sum(1 + len(ids) for ids in TOKENIZER.encode_batch(["def", "x ="]))
    assert body["usage"] == {"prompt_tokens": num_read, "completion_tokens": 24, "total_tokens": num_read + 24}


def test_token_ids_are_read_as_they_are(client: TestClient) -> None:
    ids = [TOKENIZER.eod_id, *TOKENIZER.encode_batch(["def"])[0].tolist()]
    assert completed(client, prompt=ids)["choices"] == completed(client)["choices"]
    assert completed(client, prompt=[ids, ids[1:]])["choices"][0] == completed(client)["choices"][0]


def test_a_prompt_can_be_scored_without_an_answer(client: TestClient) -> None:
    choice = completed(client, prompt=[5, 9, 17], max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == 3
    assert choice["finish_reason"] == "length"


def test_a_document_is_read_once_and_asked_often(client: TestClient) -> None:
    ids = [TOKENIZER.eod_id, *TOKENIZER.encode_batch([TEXT[:80]])[0].tolist()]
    read = completed(client, prompt=ids[:16], max_tokens=0, save_state="document")  # a whole piece
    assert read["saved_state"]["num_tokens"] == read["usage"]["prompt_tokens"] == 16
    forks = [completed(client, prompt=ids[16:], state="document", n=2) for _ in range(2)]
    assert forks[0]["choices"] == forks[1]["choices"] == completed(client, prompt=ids, n=2)["choices"]
    completed(client, prompt="    return", state="document", save_state="further")
    assert [state["id"] for state in client.get("/v1/states").json()["data"]] == ["document", "further"]
    assert client.get("/v1/states/further").json()["num_tokens"] > read["saved_state"]["num_tokens"]
    assert client.post("/v1/completions", json={**DEF, "save_state": "document"}).status_code == 409
    assert client.delete("/v1/states/document").status_code == 200
    assert client.delete("/v1/states/document").status_code == 404
    assert client.get("/v1/states/%2e%2e%2fx").status_code in (400, 404)


def test_a_conversation_is_lines_of_a_user_and_an_assistant(client: TestClient) -> None:
    fields = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": True, "top_logprobs": 1}
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    said = client.post("/v1/chat/completions", json={"messages": messages, "save_state": "turn", **fields}).json()
    plain = completed(client, prompt="Be short.\n\nUser: Hi\nAssistant:", max_tokens=8, temperature=0)
    choice = said["choices"][0]
    assert choice["message"]["content"] == plain["choices"][0]["text"]
    assert len(choice["logprobs"]["content"]) == 8
    on = {"messages": [{"role": "user", "content": "And?"}], "state": "turn", "max_completion_tokens": 4, **fields}
    del on["max_tokens"]
    assert client.post("/v1/chat/completions", json=on).json()["usage"]["completion_tokens"] == 4
    answered = [*messages, {"role": "assistant", "content": "x"}]
    status, error = refused(client, "/v1/chat/completions", messages=answered)
    assert (status, "the last message must be the user's" in error["message"]) == (400, True)


def test_full_attention_refuses_what_has_no_room(tmp_path: Path) -> None:
    with client_of(tmp_path, "attention,swa", context_tokens=40) as client:
        assert completed(client, max_tokens=30)["usage"]["completion_tokens"] == 30
        status, error = refused(client, prompt="x" * 30, max_tokens=20)
        assert (status, error["code"]) == (400, "context_length_exceeded")


def test_a_state_of_another_model_is_refused(client: TestClient, tmp_path: Path) -> None:
    with client_of(tmp_path, "swa") as other:
        completed(other, save_state="theirs")
    (tmp_path / "theirs.safetensors").rename(tmp_path / "x.safetensors")
    with client_of(tmp_path) as other:
        status, error = refused(other, **DEF, state="x")
    assert (status, error["code"]) == (422, "state_damaged")  # the digest of these tests is the same for all models


def test_a_bug_is_an_error_of_the_server(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "_check_model", lambda *_: 1 / 0)
    status, error = refused(client, **DEF)
    assert (status, error["type"], error["message"]) == (
        500, "server_error", "The server failed; its log has the details.",
    )  # fmt: skip


@pytest.mark.parametrize(("header", "status"), [
    ("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("LOCALHOST.:1", 200),
    ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("localhost@evil.example", 403),
])  # fmt: skip
def test_only_names_of_loopback_are_answered(client: TestClient, header: str, status: int) -> None:
    assert client.get("/health", headers={"Host": header}).status_code == status


@given(st.text(max_size=30))
def test_any_host_header_has_a_name(header: str) -> None:
    assert isinstance(host_name(header), str)


def test_keys_are_long_and_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    assert key_for("127.0.0.1") is key_for("localhost") is key_for("::1") is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu01"):
        with pytest.raises(UserError, match="need a key"):
            key_for(host)
    for key in ("", "short", " " * 40, "é" * 40):
        monkeypatch.setenv(API_KEY, key)
        with pytest.raises(UserError, match="at least 16 printable"):
            key_for("127.0.0.1")
    monkeypatch.setenv(API_KEY, "k" * 16)
    assert key_for("0.0.0.0") == "k" * 16
