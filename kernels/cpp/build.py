"""Compile every kernel's C++ into one shared library, once for this machine, compiler and source."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1]
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-mtune=native", "-fopenmp", "-fPIC", "-fvisibility=hidden",
    # Unlike -ffast-math these keep infinities, NaN and the order of sums.
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-Wall", "-Wextra", "-Werror=return-type",
)  # fmt: skip
TIMEOUT_S = 600


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def sources() -> list[Path]:
    """The C++ files, one or more an operator; none where the package was copied without them."""
    return sorted(KERNELS.glob("*/*.cpp"))


def compiler() -> str | None:
    """$CXX, or g++."""
    return shutil.which(os.environ.get("CXX") or "g++")


def built_library() -> Path:
    """The path of the compiled library; compiles it (some ten seconds) where that has not been done yet.

    Processes that ask at the same time wait for one to compile. One that is killed half-way leaves nothing behind that
    another would take for a library.

    Raises: BuildError: no compiler, or it fails.
    """
    found = compiler()
    if found is None:
        raise BuildError("no C++ compiler (g++): `apt install g++`, or name one in CXX")
    library = _cache_folder() / f"{_identity(found)}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(found, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiling = [
            (source, subprocess.Popen(
                [compiler, *FLAGS, "-I", str(KERNELS), "-c", str(source), "-o", f"{folder}/{i}.o"],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            ))
            for i, source in enumerate(sources())
        ]  # fmt: skip
        for source, process in compiling:
            output, _ = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                raise BuildError(f"{compiler} could not compile {source}:\n{output[-2000:]}")
        objects = [f"{folder}/{i}.o" for i in range(len(compiling))]
        # Not linked with OpenMP: its symbols are found in the runtime that torch has loaded, whose threads we share.
        linked = subprocess.run(
            [compiler, "-shared", *objects, "-o", f"{folder}/library.so"], capture_output=True, text=True
        )
        if linked.returncode:
            raise BuildError(f"{compiler} could not link the kernels:\n{linked.stderr[-2000:]}")
        os.replace(f"{folder}/library.so", library)


def _identity(compiler: str) -> str:
    """A hash of all that decides what the library is; the processor's, because it is compiled for this very one."""
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    for part in (compiler, version, *FLAGS, platform.machine(), _processor()):
        digest.update(part.encode() + b"\0")
    for file in sorted(KERNELS.glob("*/*.cpp")) + sorted(KERNELS.glob("*/*.h")):
        digest.update(str(file.relative_to(KERNELS)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Model and features of the first processor, as the kernel lists them."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bmojo", "cpp")
