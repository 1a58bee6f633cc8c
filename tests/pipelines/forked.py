"""Commands in processes of their own, forked from one that has imported what they need.

Starting Python and importing takes most of a second; what a test asks of a command takes a twentieth of that. How a
command starts has tests of its own (test_command_errors.py).
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_LONGEST_REQUEST = 1 << 20


class Ended(NamedTuple):
    """A command that ended."""

    code: int
    out: str
    err: str


def bmojo(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None = None,
    answer: str = "",
    kinds: str = "",
) -> Ended:
    """Run a command to its end.

    Args: environment: all variables it has. folder: its directory; None: this process's. answer: its standard input.
        kinds: module whose `register` adds kinds of stages of the test's own.
    """
    with TemporaryFile() as said, TemporaryFile() as out, TemporaryFile() as err:
        said.write(answer.encode())
        said.seek(0)
        files = [file.fileno() for file in (said, out, err)]
        code = _server(kinds).run(files, arguments, environment, folder or Path.cwd())
        out.seek(0)
        err.seek(0)
        return Ended(code, out.read().decode(), err.read().decode())


class _Server:
    """The process that forks. It ends with this one, at the end of their connection."""

    def __init__(self, kinds: str) -> None:
        self._connection, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # kept by rich's console
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), kinds],
                cwd=ROOT, env=environment, pass_fds=(theirs.fileno(),), start_new_session=True,
            )  # fmt: skip

    def run(self, files: list[int], arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> int:
        request = {"arguments": list(arguments), "environment": dict(environment), "folder": str(folder)}
        socket.send_fds(self._connection, [json.dumps(request).encode()], files)
        answer = self._connection.recv(64)
        assert answer, "the process that forks has ended"
        return int(answer)


@cache
def _server(kinds: str) -> _Server:
    return _Server(kinds)


def _serve(descriptor: int, kinds: str) -> None:
    if kinds:
        importlib.import_module(kinds).register()
    importlib.import_module("pipelines.api")  # commands import it when they run
    main = importlib.import_module("pipelines.cli.app").main
    connection = socket.socket(fileno=descriptor)
    while True:
        request, files, _, _ = socket.recv_fds(connection, _LONGEST_REQUEST, 3)
        if not request:
            return
        child = os.fork()
        if child == 0:
            connection.close()
            _become(json.loads(request), files)
            os._exit(_code_of(main))
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(request: dict[str, Any], files: Sequence[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["bmojo", *request["arguments"]]


def _code_of(main: Any) -> int:
    try:
        main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
