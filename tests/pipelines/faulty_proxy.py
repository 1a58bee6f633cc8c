"""An HTTP proxy on loopback that breaks requests on their way to a real server, as told by the test."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[str, str], str | None]  # method, path -> what to do, None: pass it on

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class FaultyProxy:
    """Forwards to `upstream` ("http://host:port") except where `fault` says otherwise:

    "503 SlowDown" (any status and code): answers so; "reset": closes the connection at once; "lost": passes the request
    on, then closes without an answer; "partial": half of the answer; "hang": answers nothing for `hang_s`.
    """

    def __init__(self, upstream: str, hang_s: float = 30.0, port: int = 0) -> None:
        """`port`: where it listens; 0: any that is free."""
        self.fault: Fault = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._hang_s = hang_s
        proxy, (host, upstream_port) = self, upstream.removeprefix("http://").split(":")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append((self.command, self.path))
                fault = proxy.fault(self.command, self.path)
                if fault == "hang":
                    time.sleep(proxy._hang_s)
                if fault in ("reset", "hang"):
                    return self._hang_up()
                if fault is not None and fault[:3].isdigit():
                    status, _, code = fault.partition(" ")
                    return self._answer(int(status), [], _ERROR.format(code=code).encode())
                connection = http.client.HTTPConnection(host, int(upstream_port), timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                connection.close()
                if fault == "lost":
                    return self._hang_up()
                headers = [item for item in response.getheaders() if item[0].lower() not in _HOP_HEADERS]
                length = response.getheader("Content-Length") if self.command == "HEAD" else None
                self._answer(response.status, headers, content, length, partial=fault == "partial")

            def _answer(
                self,
                status: int,
                headers: list[tuple[str, str]],
                content: bytes,
                length: str | None = None,
                partial: bool = False,
            ) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if partial else content)
                if partial:
                    self._hang_up()

            def _hang_up(self) -> None:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def first(self, count: int, fault: str, method: str | None = None) -> None:
        """Break so the next `count` requests (of one method)."""
        left = [count]

        def broken(asked: str, path: str) -> str | None:
            if left[0] <= 0 or (method is not None and asked != method):
                return None
            left[0] -= 1
            return fault

        self.fault = broken

    def close(self) -> None:
        """Stop listening: connections are refused."""
        self._server.shutdown()
        self._server.server_close()
