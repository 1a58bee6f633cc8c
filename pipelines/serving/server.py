"""A server process: a socket, uvicorn on it, and an end in order."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from base.errors import UserError
from pipelines.engine.interrupts import kept_handlers


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that others can already connect to once `serve` runs. Raises: UserError: the address is not free."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        problem = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"--host {host} --port {port}: {problem}. Choose another port; 0 takes a free one.") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Where to ask."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Starlette, bound: socket.socket, drain_s: int, announce: Callable[[], None]) -> None:
    """Run until SIGTERM or Ctrl-C. Then nothing new is taken, and what is under way has `drain_s` to end.

    A second signal ends it at once.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=drain_s, lifespan="on", server_header=False
    )
    with kept_handlers():
        _Server(config, announce).run(sockets=[bound])


class _Server(uvicorn.Server):
    """uvicorn's, that raises no signal again after it ended in order: that is no failure."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        yield

    def _on_signal(self, *_: object) -> None:
        self._num_signals += 1
        self.should_exit = True
        if self._num_signals > 1:
            self.force_exit = True
