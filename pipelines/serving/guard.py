"""Who may ask: a key, and the name by which browsers call the server."""

from __future__ import annotations

import hmac
import ipaddress
import os

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from base.errors import UserError
from pipelines.serving.protocol import ApiError

API_KEY = "BMOJO_API_KEY"
MIN_KEY_CHARS = 16


class Guard:
    """Refuses requests without the key, if there is one.

    Without a key the server is on loopback; then it refuses those for another host. A page of the web can make a
    browser ask 127.0.0.1 under a name of its own (DNS rebinding), but the Host header has that name.
    /health needs no key.
    """

    def __init__(self, app: ASGIApp, host: str, key: str | None) -> None:
        self._app, self._key = app, key
        self._hosts = {"localhost", "127.0.0.1", "::1", host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(Headers(scope=scope), scope["path"])
            if refusal is not None:
                headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
                await JSONResponse(refusal.body(), refusal.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        if self._key is None:
            name = host_name(headers.get("host", ""))
            if name not in self._hosts:
                return ApiError(
                    403, f"This server answers on loopback only, not as {name!r}: ask 127.0.0.1 or localhost.",
                    code="wrong_host",
                )  # fmt: skip
            return None
        if path == "/health":
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key.encode()):
            return None
        return ApiError(401, "A key is needed: send it as Authorization: Bearer KEY.", code="invalid_api_key")


def host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    name, bracket, _ = header.rpartition("]")
    return (name.lstrip("[") if bracket else header.partition(":")[0]).lower().rstrip(".")


def key_for(host: str) -> str | None:
    """The key that the environment has. Raises: UserError: it must have one for this host, or a longer one."""
    key = os.environ.get(API_KEY)
    if key is None:
        if not is_loopback(host):
            raise UserError(
                f"--host {host} lets others on the network ask this server, so they need a key. Set {API_KEY} in the "
                "environment, for example to the output of: openssl rand -hex 32"
            )
        return None
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{API_KEY} must be at least {MIN_KEY_CHARS} printable ASCII characters without spaces, for example the "
            "output of: openssl rand -hex 32"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
