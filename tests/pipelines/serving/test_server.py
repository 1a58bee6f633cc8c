"""The server as a process: sockets, clients at once, signals, kills."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from base.errors import UserError
from pipelines.serving.server import bound_socket
from tests.pipelines.serving.served import Served, start
from tests.pipelines.stages.trained_run import TEXT
from tests.pipelines.waiting import wait_until

pytestmark = pytest.mark.ci

SHORT = {"prompt": TEXT[:30], "max_tokens": 8, "seed": 5, "ignore_eos": True, "return_token_ids": True}
KEY = "a-key-of-thirty-two-characters--"
ENDLESS = {**SHORT, "max_tokens": 1_000_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    served = start(folder, "--queue-size", "4", "--max-tokens", "1000000")
    yield served
    assert served.stop() == 0


def post(server: Served, body: dict[str, Any], path: str = "completions") -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=300, headers=server.headers)


def tokens_of(response: httpx.Response) -> list[list[int]]:
    assert response.status_code == 200, response.text
    return [choice["token_ids"] for choice in response.json()["choices"]]


def load_of(server: Served) -> dict[str, Any]:
    load: dict[str, Any] = httpx.get(f"{server.url}/health", timeout=300).json()
    return load


def test_sixteen_clients_at_once_get_the_tokens_that_each_gets_alone(server: Served) -> None:
    bodies = [
        {
            **SHORT,
            "prompt": TEXT[n : 20 + 20 * n],
            "max_tokens": 6 + n % 7,
            "seed": n,
            "temperature": [0, 0.8, 1.2][n % 3],
        }
        for n in range(16)
    ]
    alone = [tokens_of(post(server, body)) for body in bodies]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(lambda body: tokens_of(post(server, body)), bodies))
    assert together == alone
    metrics = httpx.get(f"{server.url}/metrics", timeout=300).text
    largest = [line for line in metrics.splitlines() if line.startswith('bmojo_batch_size_bucket{le="1.0"}')]
    count = [line for line in metrics.splitlines() if line.startswith("bmojo_batch_size_count")]
    assert float(largest[0].split()[1]) < float(count[0].split()[1])  # some steps were of several


def test_a_stream_is_the_same_text_in_pieces(server: Served) -> None:
    whole = post(server, {**SHORT, "max_tokens": 30}).json()
    body = {**SHORT, "max_tokens": 30, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(part["text"] for part in parts) == whole["choices"][0]["text"]
    assert [token for part in parts for token in part["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert len(parts) > 10


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_gives_its_rows_back(server: Served, stream: bool) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    body = json.dumps({**ENDLESS, "n": 18, "stream": stream}).encode()  # two of them wait for a row
    headers = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", *headers, "", ""])
    with socket.create_connection(address) as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: load_of(server)["answers_running"] == 16)
        assert load_of(server)["answers_waiting"] == 2
        refused = post(server, {**SHORT, "n": 3})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "1"
    wait_until(lambda: load_of(server)["answers_running"] == load_of(server)["answers_waiting"] == 0)


@pytest.fixture(scope="module")
def killed(folder: Path) -> Iterator[Served]:
    """A server, with a key and for the network, after one that was killed while it answered."""
    first = start(folder)
    assert post(first, {**SHORT, "save_state": "kept"}).json()["saved_state"]["num_tokens"] > 8
    lost = {**SHORT, "max_tokens": 8000, "stream": True, "save_state": "lost"}
    with httpx.stream("POST", f"{first.url}/v1/completions", json=lost, timeout=300) as response:
        next(response.iter_lines())
        first.stop(signal.SIGKILL)
    again = start(folder, "--host", "0.0.0.0", BMOJO_API_KEY=KEY)
    yield Served(again.process, again.url.replace("0.0.0.0", "127.0.0.1"), KEY)
    again.process.kill()
    again.process.wait()


def test_states_outlive_a_killed_server(server: Served, killed: Served) -> None:
    listed = httpx.get(f"{killed.url}/v1/states", timeout=300, headers=killed.headers).json()
    assert [state["id"] for state in listed["data"]] == ["kept"]
    on = {**SHORT, "prompt": "", "state": "kept", "n": 3}
    assert tokens_of(post(killed, on)) == tokens_of(post(server, on))  # of one folder
    assert post(killed, {**SHORT, "save_state": "kept"}).status_code == 409
    deleted = httpx.delete(f"{killed.url}/v1/states/kept", timeout=300, headers=killed.headers)
    assert deleted.json()["deleted"] is True


def test_a_key_is_needed_on_the_network(killed: Served) -> None:
    for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}):
        wrong = httpx.get(f"{killed.url}/v1/models", timeout=300, headers=headers)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{killed.url}/metrics", timeout=300).status_code == 401
    assert httpx.get(f"{killed.url}/health", timeout=300).status_code == 200
    named = {**killed.headers, "Host": "gpu01.example.org"}
    right = httpx.get(f"{killed.url}/v1/models", timeout=300, headers=named)
    assert right.json()["data"][0]["id"] == "tiny-00000000/train"


def test_sigterm_lets_answers_end_takes_no_new_ones_and_the_key_was_never_shown(killed: Served) -> None:
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(post, killed, {**SHORT, "max_tokens": 400})
        wait_until(lambda: load_of(killed)["answers_running"] == 1)
        assert killed.stop(signal.SIGTERM) == 0
        assert len(tokens_of(answer.result())[0]) == 400
    with pytest.raises(httpx.ConnectError):
        load_of(killed)
    assert killed.process.stdout is not None
    shown = killed.process.stdout.read()
    assert "Stopped." in shown
    assert KEY not in shown


def test_a_port_in_use_is_said(server: Served) -> None:
    with pytest.raises(UserError, match=r"Address already in use\. Choose another port; 0 takes a free one"):
        bound_socket("127.0.0.1", int(server.url.rpartition(":")[2]))


def test_the_openai_library_works(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed")
    model = client.models.list().data[0].id
    plain = {"model": model, "prompt": TEXT[:30], "max_tokens": 8, "seed": 5}
    whole = client.completions.create(**plain, logprobs=2, extra_body={"ignore_eos": True})
    assert whole.usage.completion_tokens == 8
    assert len(whole.choices[0].logprobs.token_logprobs) == 8
    parts = client.completions.create(**plain, stream=True, extra_body={"ignore_eos": True})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    said = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert said.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True, seed=1
    )
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.completions.create(**{**plain, "model": "gpt-5"})
    with pytest.raises(openai.BadRequestError, match="Unknown field 'best_off'"):
        client.completions.create(**plain, extra_body={"best_off": 2})
