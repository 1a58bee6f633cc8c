"""Compile every kernel's C++ into one shared library, once for this machine, compiler and source."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from base.cache import cache_dir
from kernels.cpp import constants

logger = logging.getLogger(__name__)
KERNELS = Path(__file__).resolve().parents[1]
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-mtune=native", "-fopenmp", "-fPIC", "-fvisibility=hidden",
    # Unlike -ffast-math these keep infinities, NaN and the order of sums.
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-Wall", "-Wextra", "-Werror=return-type",
    *(f"-DBMOJO_{name}={value}" for name, value in vars(constants).items() if name.isupper()),
)  # fmt: skip
TIMEOUT_S = 600


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def sources() -> list[Path]:
    """The C++ files, one or more per operator; none if the package was copied without them."""
    return sorted(KERNELS.glob("*/*.cpp")) if (KERNELS / "cpp" / "tensor.h").exists() else []


def compiler() -> list[str]:
    """$CXX, which may have arguments, or g++. Raises: BuildError: there is no such program."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler ({command[0]}): `apt install g++`, or name one in CXX")
    return command


def built_library() -> Path:
    """The path of the compiled library; compiles it (some ten seconds) if that has not been done yet.

    Processes that ask at the same time wait for one to compile. A file's name ends in a hash of its content, so what a
    killed process, a full disk or a power cut leaves behind is never loaded.

    Raises: BuildError: no compiler, or it fails. OSError: the cache cannot be written.
    """
    import fcntl  # not on Windows, where exported models run too: they carry no C++

    command = compiler()
    folder, identity = cache_dir() / "cpp", _identity(command)
    found = _intact(folder, identity)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{identity}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _intact(folder, identity) or _compile(command, folder, identity)
    return found


def _intact(folder: Path, identity: str) -> Path | None:
    """The library that was built before. One that is damaged is removed."""
    for library in folder.glob(f"{identity}-*.so"):
        if library.stem.partition("-")[2] == _digest(library.read_bytes()):
            return library
        library.unlink()
    return None


def _compile(command: list[str], folder: Path, identity: str) -> Path:
    logger.info("Compiling the C++ kernels for this processor, once, in about ten seconds: %s", folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [f"{scratch}/{i}.o" for i in range(len(sources()))]
        _run([
            [*command, *FLAGS, "-I", str(KERNELS), "-c", str(source), "-o", target]
            for source, target in zip(sources(), objects, strict=True)
        ])  # fmt: skip
        # Not linked with OpenMP: its symbols are found in the runtime that torch has loaded, whose threads we share.
        linked = Path(scratch, "library.so")
        _run([[*command, "-shared", *objects, "-o", str(linked)]])
        library = folder / f"{identity}-{_digest(linked.read_bytes())}.so"
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(linked, library)
    return library


def _run(commands: list[list[str]]) -> None:
    """Run all at once, to the end of each. Raises: BuildError: one fails, or takes too long."""
    running: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                    start_new_session=True,
                )
            )  # fmt: skip
        for command, process in zip(commands, running, strict=True):
            output, _ = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                raise BuildError(f"`{shlex.join(command)}` failed:\n{output[-2000:]}")
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"`{shlex.join(error.cmd)}` took longer than {TIMEOUT_S} s") from None
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _identity(command: list[str]) -> str:
    """A hash of all that decides what the library is; the processor's, because it is compiled for this very one."""
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, timeout=TIMEOUT_S).stdout
    except subprocess.TimeoutExpired:
        raise BuildError(f"`{shlex.join(command)} --version` took longer than {TIMEOUT_S} s") from None
    parts = [version, *map(str.encode, (*command, *FLAGS, platform.machine(), _processor()))]
    for file in sorted([*KERNELS.glob("*/*.cpp"), *KERNELS.glob("*/*.h")]):
        parts += [str(file.relative_to(KERNELS)).encode(), file.read_bytes()]
    return _digest(b"\0".join(parts))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _processor() -> str:
    """Model and features of the first processor, as the kernel lists them."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))
