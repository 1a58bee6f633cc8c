"""The dashboard of a Ray cluster, which takes jobs: finding it, and what may be wrong with it."""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.ray_errors import explained_ray

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT = "http://127.0.0.1:8265"
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_ANSWER_S = 15.0
_NODES_TRIES = 10


def dashboard_address(given: str | None) -> str:
    """The URL to submit to: as given, as RAY_API_SERVER_ADDRESS or RAY_ADDRESS says, or the default on this machine.

    Raises: UserError: it is not the URL of a dashboard.
    """
    origin, address = "--address ", given
    if address is None:
        name = next((name for name in _VARIABLES if os.environ.get(name)), None)
        if name is None:
            return DEFAULT
        origin, address = f"{name}=", os.environ[name]
    scheme, separator, rest = address.partition("://")
    host = rest.partition("/")[0].rpartition(":")[0] or rest
    if scheme == "ray" and separator:
        raise UserError(
            f"{origin}{address}: pipelines cannot run through Ray Client (ray://). Submit to the dashboard of that "
            f"cluster: --address http://{host}:8265."
        )
    if scheme not in ("http", "https") or not rest:
        host = "HEAD" if separator or address == "auto" else address.partition(":")[0]
        raise UserError(
            f"{origin}{address} is not the address of a dashboard, which takes jobs. Give its URL: --address "
            f"http://{host}:8265 (`ray start` prints it on the head)."
        )
    return address.rstrip("/")


def connect(url: str) -> JobSubmissionClient:
    """A client for jobs, once the dashboard answers and takes our token.

    Raises: UserError: nothing is there, something else is, or the token is wrong. InfrastructureError: it is silent.
    """
    _look_for_dashboard(url)
    from ray.dashboard.modules.job.sdk import JobSubmissionClient

    for module in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(module).setLevel(logging.WARNING)
    with explained_jobs(url), _only(url):
        return JobSubmissionClient(url)


@contextmanager
def explained_jobs(url: str) -> Iterator[None]:
    """Turn errors of Ray's client for jobs into ours."""
    with explained_ray(f"--address {url}"):
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:  # requests has OSErrors
            text = " ".join(str(error).split())[:500]
            raise InfrastructureError(f"--address {url}: the dashboard does not do what was asked: {text}") from error


def is_on_this_machine(url: str) -> bool:
    """Whether all nodes of the cluster have an address of this machine. A dashboard behind a tunnel only looks so."""
    from ray.util.state import list_nodes

    nodes = []
    for _ in range(_NODES_TRIES):  # a head that has just started does not know its nodes yet
        with suppress(Exception), _only(url):  # of many kinds, and only a courtesy depends on it
            nodes = list_nodes(address=url, timeout=int(_ANSWER_S), filters=[("state", "=", "ALIVE")])
        if nodes:
            break
        time.sleep(1)
    ours = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(nodes) and all(node.node_ip in ours for node in nodes)


def _look_for_dashboard(url: str) -> None:
    """Say within seconds, in our own words, what is not there; Ray's client has no time-out."""
    what = f"--address {url}"
    advice = "Give the URL of the cluster's dashboard, such as http://HEAD:8265 (`ray start` prints it on the head)."
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=_ANSWER_S) as answer:
            found = json.load(answer)
        if "ray_version" not in found:
            raise ValueError("no version of Ray")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise UserError(f"{what}: something answers there ({error}), but no Ray dashboard. {advice}") from error
    except (http.client.HTTPException, ConnectionResetError, ValueError, TypeError) as error:
        raise UserError(
            f"{what}: something answers there, but no Ray dashboard (is it the port of the head itself, 6379, or of "
            f"Ray Client, 10001?). {advice}"
        ) from error
    except OSError as error:
        raise _unreachable(what, advice, error) from error


def _unreachable(what: str, advice: str, error: OSError) -> UserError | InfrastructureError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, socket.gaierror):
        return UserError(f"{what}: there is no such machine ({reason}). {advice}")
    if isinstance(reason, ConnectionRefusedError):
        return UserError(
            f"{what}: nothing listens there. Start the cluster's head with its dashboard, or a tunnel to it. {advice}"
        )
    if isinstance(reason, ssl.SSLError):
        return UserError(f"{what}: no secure connection ({reason}). Is it http://? {advice}")
    if isinstance(reason, ConnectionResetError):
        return UserError(f"{what}: something answers there, but no Ray dashboard ({reason}). {advice}")
    return InfrastructureError(f"{what}: does not answer ({reason}). Check that machine and the network.")


@contextmanager
def _only(url: str) -> Iterator[None]:
    """Ray's clients prefer this variable, and RAY_ADDRESS, to the address that they are given."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before
