"""The address to submit to: which is taken, and what is said of what is there."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.submit import dashboard
from pipelines.submit.dashboard import connect, dashboard_address


@pytest.fixture(autouse=True)
def _no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


def test_what_is_given_wins_over_the_environment_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dashboard_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert dashboard_address(None) == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example.org/team/")
    assert dashboard_address(None) == "https://ray.example.org/team"
    assert dashboard_address("http://other:8265/") == "http://other:8265"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", "cannot run through Ray Client.*--address http://head:8265"),
        ("ray://head", "cannot run through Ray Client.*--address http://head:8265"),
        ("head:6379", "is not the address of a dashboard.*--address http://head:8265"),
        ("auto", "is not the address of a dashboard.*--address http://HEAD:8265"),
        ("ftp://head", "is not the address of a dashboard"),
        ("http://", "is not the address of a dashboard"),
    ],
)
def test_other_addresses_are_refused_with_the_one_to_give(address: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        dashboard_address(address)


def test_the_variable_that_holds_a_wrong_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UserError, match="RAY_ADDRESS=ray://head:10001: "):
        dashboard_address(None)


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A web server that is no Ray dashboard."""

    def do_GET(self) -> None:
        body = b"{}" if self.server.server_address[1] % 2 else b"<html>"
        self.send_response(200 if "found" in self.path else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def web_server() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """It takes connections, and sends nothing, or rubbish."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_web_server_that_is_no_dashboard_is_told_apart(web_server: str) -> None:
    with pytest.raises(UserError, match=r"something answers there.*no Ray dashboard"):
        connect(web_server)
    with pytest.raises(UserError, match=r"something answers there.*no Ray dashboard"):
        connect(f"{web_server}/found")


def test_nobody_there_no_such_machine_and_silence_are_told_apart(
    silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="nothing listens there"):
            connect(f"http://127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(UserError, match="there is no such machine"):
        connect("http://no-such-host.invalid:8265")
    monkeypatch.setattr(dashboard, "_ANSWER_S", 0.2)
    with pytest.raises(InfrastructureError, match="does not answer"):
        connect(f"http://127.0.0.1:{silent_port}")


def test_the_port_of_another_protocol_is_no_dashboard() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00")  # as gRPC begins
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="port of the head itself, 6379"):
            connect(f"http://127.0.0.1:{listening.getsockname()[1]}")
