"""The process that clients of the object store talk to; it does to requests what its standard input says."""

from __future__ import annotations

import sys

from tests.faults.places import TTL_S
from tests.pipelines.faulty_proxy import FaultyProxy


def main(port: int, upstream: str) -> None:
    """Forward until the standard input ends. Each line is a fault (FaultyProxy) from then on; an empty one is none."""
    proxy = FaultyProxy(upstream, hang_s=TTL_S, port=port)
    for line in sys.stdin:
        fault = line.strip() or None
        proxy.fault = lambda method, path, fault=fault: fault  # type: ignore[misc]
