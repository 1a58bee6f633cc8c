"""Shared memory of killed streams is cleared at the next start; that of living ones is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from data.shared_memory import Namespace, remove_stale

HOLD_A_NAMESPACE = """
import os, sys, time
from pathlib import Path
from data.shared_memory import Namespace
namespace = Namespace(0, 1, 1, Path(sys.argv[1]))
for name in ("locals", "barrier"):
    os.close(os.open(f"/dev/shm/{namespace.first:06}_{name}", os.O_CREAT | os.O_RDWR))
print(namespace.first, flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is not a folder on this system")


def segments(first: int) -> list[str]:
    return sorted(name for name in os.listdir("/dev/shm") if name.startswith(f"{first}_"))


def test_segments_of_a_killed_owner_are_removed_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD_A_NAMESPACE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        first = int(owner.stdout.readline())
        assert segments(first) == [f"{first}_barrier", f"{first}_locals"]
        assert remove_stale(tmp_path) == []
        assert len(segments(first)) == 2
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    other = Namespace(0, 1, 1, tmp_path)
    assert segments(first) == []
    assert [file.name for file in tmp_path.iterdir()] == [f"{other.first}.lock"]
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_foreign_segments_are_never_touched(tmp_path: Path) -> None:
    foreign = SharedMemory("000000_bmojo_test_foreign", create=True, size=8)
    try:
        Namespace(0, 1, 1, tmp_path).release()
        assert Path("/dev/shm/000000_bmojo_test_foreign").exists()
    finally:
        foreign.close()
        foreign.unlink()


def test_every_attempt_has_a_number_of_its_own(tmp_path: Path) -> None:
    namespaces = [Namespace(0, 1, 1, tmp_path) for _ in range(20)]
    assert len({namespace.first for namespace in namespaces}) == 20
    assert all(len(str(namespace.first)) == 11 for namespace in namespaces)
    for namespace in namespaces:
        namespace.release()
