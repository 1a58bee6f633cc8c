"""Building the C++ kernels: without a compiler, with a failing one, at the same time, or when killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from kernels.cpp import build, library
from kernels.operator import use
from kernels.pointwise import gated_product


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of compiled libraries, and no memory of what was loaded before."""
    monkeypatch.delenv("BMOJO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for remembered in (library.is_available, library.load, library._function):
        remembered.cache_clear()
    yield tmp_path
    for remembered in (library.is_available, library.load, library._function):
        remembered.cache_clear()


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that compiles at once, in place of ours."""
    folder = tmp_path / "sources" / "one"
    folder.mkdir(parents=True)
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    (folder.parent / "cpp").mkdir()
    (folder.parent / "cpp" / "tensor.h").touch()
    monkeypatch.setattr(build, "KERNELS", folder.parent)
    return folder / "one.cpp"


def fake_compiler(folder: Path, body: str) -> Path:
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return script


def test_without_a_compiler_plain_torch_runs_and_says_so_once(own_cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert [gated_product.choose(torch.zeros(2)).path for _ in range(3)] == ["torch"] * 3
    assert len(caplog.records) == 1
    assert "no C++ compiler (no-such-compiler): `apt install g++`, or name one in CXX" in caplog.text
    with use("cpp"), pytest.raises(build.BuildError, match="apt install g"):
        gated_product(torch.zeros(2))


def test_a_failing_compiler_is_quoted(own_cache, small_sources, monkeypatch):
    small_sources.write_text("this is not C++\n")
    with pytest.raises(build.BuildError, match=r"g\+\+ .*one\.cpp.* failed:\n(.|\n)*error"):
        build.built_library()
    assert not list(own_cache.glob("bmojo/cpp/*.so"))


def test_a_library_is_compiled_once_and_again_when_a_source_changes(own_cache, small_sources):
    first = build.built_library()
    made = first.stat().st_mtime_ns
    assert build.built_library() == first
    assert first.stat().st_mtime_ns == made
    small_sources.write_text('extern "C" int one() { return 2; }\n')
    assert build.built_library() != first


def builder(small_sources: Path) -> list[str]:
    """A process that builds the small library and prints its path."""
    code = (
        "from pathlib import Path\nfrom kernels.cpp import build\n"
        f"build.KERNELS = Path({str(small_sources.parents[1])!r})\nprint(build.built_library())"
    )
    return [sys.executable, "-c", code]


def test_processes_that_ask_at_once_wait_for_one_compilation(own_cache, small_sources, monkeypatch):
    calls = own_cache / "calls"
    monkeypatch.setenv("CXX", str(fake_compiler(own_cache, f'echo "$@" >> {calls}; sleep 0.3; exec g++ "$@"')))
    processes = [subprocess.Popen(builder(small_sources), stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert not any(process.returncode for process in processes)
    assert sum(" -c " in line for line in calls.read_text().splitlines()) == 1


def test_a_process_killed_while_it_compiles_leaves_nothing_that_is_taken_for_a_library(own_cache, small_sources):
    started = own_cache / "started"
    slow = fake_compiler(own_cache, f'case "$*" in *-shared*) touch {started}; sleep 60;; esac; exec g++ "$@"')
    child = subprocess.Popen(builder(small_sources), env=os.environ | {"CXX": str(slow)}, start_new_session=True)
    while not started.exists():
        assert child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not list(own_cache.glob("bmojo/cpp/*.so"))
    assert build.built_library().exists()


@pytest.mark.parametrize("kept", [0, 1000, -100])
def test_a_damaged_library_is_built_again(kept, own_cache, small_sources):
    whole = build.built_library()
    content = whole.read_bytes()
    whole.write_bytes(content[:kept])
    assert build.built_library().read_bytes() == content


def test_a_compiler_that_hangs_is_ended_and_said(own_cache, small_sources, monkeypatch):
    monkeypatch.setattr(build, "TIMEOUT_S", 1)
    pids = own_cache / "pids"
    hanging = fake_compiler(own_cache, f'case "$*" in *--version*) ;; *) echo $$ >> {pids}; sleep 60; esac')
    monkeypatch.setenv("CXX", str(hanging))
    with pytest.raises(build.BuildError, match="took longer than 1 s"):
        build.built_library()
    for pid in pids.read_text().split():
        assert not Path(f"/proc/{pid}").exists()


def test_cxx_may_have_arguments(own_cache, small_sources, monkeypatch):
    monkeypatch.setenv("CXX", "env LC_ALL=C g++ -DSMALL")
    assert build.built_library().exists()


def test_a_user_without_home_compiles_in_the_temporary_folder(small_sources, monkeypatch, tmp_path):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "BMOJO_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tmp_path in build.built_library().parents


def test_the_cpp_of_others_is_not_ours(small_sources):
    """As in transformers' folder of model code, where an exported model without C++ has neighbours."""
    (small_sources.parents[1] / "cpp" / "tensor.h").unlink()
    assert build.sources() == []


def test_the_kernels_compile_without_a_warning(own_cache, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-Werror", "-fsyntax-only"))
    with pytest.raises(build.BuildError, match="-shared"):  # all but the link, for which nothing has been written
        build.built_library()
