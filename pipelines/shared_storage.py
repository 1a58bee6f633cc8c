"""Whether the nodes of a Ray cluster see a local storage path: the one thing about a path that only they know."""

from __future__ import annotations

import secrets
import time
from typing import Any

from base.errors import UserError
from pipelines.errors import InfrastructureError
from pipelines.ray_errors import explained_ray, is_lost_process
from pipelines.storage import LocalStorage, open_storage

_ANSWER_S = 120.0  # for every node to answer: it may have to unpack our packages and to start a process first
_LOOK_S = 5.0  # for which a node keeps looking: a shared mount may show a new file late


def check_shared_storage(url: str) -> None:
    """Refuse a local storage path that some node of the joined cluster does not see.

    Writes a file there and has one task on each node read it. Object stores, and clusters of one node, need no check.

    Raises:
        UserError: names the nodes that do not see the file.
        InfrastructureError: a living node does not answer.
    """
    import ray

    storage = open_storage(url)
    nodes = {node["NodeID"]: _name(node) for node in ray.nodes() if node["Alive"]}
    if not isinstance(storage, LocalStorage) or len(nodes) < 2:
        return
    probe, content = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
    storage.write_bytes_atomic(probe, content)
    try:
        with explained_ray("Checking whether the nodes share the storage"):
            blind = _nodes_that_differ(nodes, str(storage.path(probe)), content)
    finally:
        storage.delete(probe)
    if blind:
        raise UserError(
            f"storage={url}: {len(blind)} of {len(nodes)} nodes of the cluster do not see the files that this machine "
            f"writes to {storage.url}: {', '.join(sorted(blind))}. Set `storage` to an object store (s3://bucket/prefix)"
            ", or to a folder that is mounted at the same path on every node (NFS, Lustre)."
        )


def read_probe(path: str) -> bytes | None:
    """What a node finds at `path`; None if there is nothing that it can read."""
    deadline = time.monotonic() + _LOOK_S
    while True:
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.25)


def _nodes_that_differ(nodes: dict[str, str], path: str, content: bytes) -> list[str]:
    """Names of the nodes that do not find `content` at `path`. A node that dies meanwhile does not count."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(read_probe)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path): name
        for node, name in nodes.items()
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    if silent:
        for reference in silent:
            ray.cancel(reference)
        raise InfrastructureError(
            f"Checking whether the nodes share the storage: no answer in {_ANSWER_S:g} s from "
            f"{', '.join(sorted(asked[reference] for reference in silent))}. `ray status` shows how the nodes are."
        )
    return [asked[reference] for reference in answered if _answer(reference, if_lost=content) != content]


def _answer(reference: Any, if_lost: bytes) -> bytes | None:
    """What the node found; `if_lost` if the node is gone."""
    import ray

    try:
        found: bytes | None = ray.get(reference)
    except ray.exceptions.RayError as error:
        if is_lost_process(error):
            return if_lost
        raise
    return found


def _name(node: dict[str, Any]) -> str:
    name, address = node["NodeName"], node["NodeManagerAddress"]
    return f"{node['NodeManagerHostname'] if name == address else name} ({address})"
