"""MLflow's web server on a store of ours: one worker, no job runner, and nothing left of it when the caller ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.tracking.mlflow.target import MlflowTarget

START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
_SHOWN_LOG_LINES = 10


def serve(target: MlflowTarget, host: str, port: int, allowed_hosts: str | None, on_ready: Callable[[], None]) -> None:
    """Run the server until it or this process ends. Call it from the main thread. `on_ready` is called once it answers.

    Raises:
        UserError: the address cannot be listened on. InfrastructureError: the server ended or did not answer.
        KeyboardInterrupt, Terminated: SIGINT, SIGTERM (pipelines.engine.interrupts); the server has ended then.
    """
    require_free(host, port)
    assert target.artifact_root is not None, "only a store of ours is served"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)]
    command += ["--backend-store-uri", target.uri, "--default-artifact-root", target.artifact_root.as_uri()]
    allowed_hosts = allowed_hosts or _default_hosts(host)
    if allowed_hosts:
        command += ["--allowed-hosts", allowed_hosts]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # mlflow passes it on to its worker

    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the server in order
            preexec_fn=die_with_parent,
        )
        try:
            _wait_until_ready(server, host, port, log)
            on_ready()
            server.wait()
            raise InfrastructureError(_ended(server, log))
        finally:
            _stop(server)


def require_free(host: str, port: int) -> None:
    """Raises UserError: nothing can listen on this address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{host}:{port} cannot be listened on ({reason}). Choose another port with --port or address with --host."
        ) from error


def _default_hosts(host: str) -> str | None:
    """Names that browsers may call a server by that listens to the network; MLflow's own default knows none of them."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return None
    names = {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}
    if host not in ("0.0.0.0", "::"):
        names.add(host)
    private = ["10.*", "192.168.*", *(f"172.{number}.*" for number in range(16, 32))]
    return ",".join([*sorted(names), *(f"{name}:*" for name in sorted(names)), *private])


def _wait_until_ready(server: subprocess.Popen[bytes], host: str, port: int, log: IO[bytes]) -> None:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise InfrastructureError(_ended(server, log))
        try:
            opener.open(f"http://{shown}:{port}/health", timeout=2).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, if only that this name is not allowed
        except OSError:
            time.sleep(0.2)
    raise InfrastructureError(f"The MLflow server did not answer within {START_TIMEOUT_S:.0f} s.\n{_tail(log)}")


def _ended(server: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    return f"The MLflow server ended with exit code {server.returncode}. Its last lines:\n{_tail(log)}"


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-_SHOWN_LOG_LINES:])


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        server.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
