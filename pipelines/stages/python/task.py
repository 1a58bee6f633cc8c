"""The Ray task of a `python` stage: it imports the user's function from the shipped source, and calls it.

What the function raises: errors of disks, networks and stores that may pass, and InfrastructureError, are the
infrastructure's, so the stage is RESUMABLE. All else is the function's: FAILED, exit code 1, with the lines of the
user's own code. A bug in it is not one of this program.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import UserError
from pipelines.errors import InfrastructureError, causes
from pipelines.faults import Fault, judge
from pipelines.stages.python.output import PythonOutput
from pipelines.stages.python.running import FILES_FOLDER, Input, PointJournal, RunningStage
from pipelines.storage.artifact import ArtifactDir

SOURCE_FOLDER = "source"

LOG_FILE = "log.txt"
_MAX_LINES = 12  # of the user's code in a message
_MAX_TEXT = 1500


@dataclass(frozen=True)
class Call:
    """What travels to the task. The function does not: it is imported there."""

    stage: str
    call: str  # module:function
    args: Mapping[str, Any]
    inputs: Mapping[str, Input]
    gathered: Mapping[str, tuple[Input, ...]]
    modules: Mapping[str, str]  # name of each shipped module -> its file where the user wrote it
    artifact: ArtifactDir


def call_function(call: Call, journal: PointJournal) -> PythonOutput:
    """Call the user's function on this machine. Runs as a Ray task.

    Raises: UserError: the function is not there, fails, or returns something else than facts.
        InfrastructureError: a disk, a store or the network failed.
    """
    artifact = call.artifact
    source = artifact.fetch(SOURCE_FOLDER)
    folder = artifact.restore(FILES_FOLDER)

    def publish() -> None:
        artifact.publish(LOG_FILE)
        artifact.publish_exactly(FILES_FOLDER)

    with _log_file(call.stage, artifact.local / LOG_FILE) as log, importable(source, call.modules):
        stage = RunningStage(
            folder, call.args, call.inputs, call.gathered,
            name=call.stage, log=log, journal=journal, publish=publish,
        )  # fmt: skip
        try:
            output = _returned(call, _function(call)(stage))
        except Exception as error:
            log.exception("%s failed", call.call)
            with suppress(UserError, InfrastructureError):
                artifact.publish(LOG_FILE)
            raise _explained(error, call, source) from None
        except SystemExit as error:
            if hasattr(error, "ray_terminate_msg"):  # Ray's way to end this process
                raise
            raise UserError(f"{call.call} called sys.exit({error.code!r}). Return, or raise an error.") from None
        journal.log_metrics(stage.last_step, output.figures())
        stage.save()
    return output


def _function(call: Call) -> Callable[[RunningStage], Any]:
    module, _, path = call.call.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        if not hasattr(found, name):
            raise UserError(f"{call.call}: {getattr(found, '__name__', found)} has no {name!r}. Correct `call`.")
        found = getattr(found, name)
    if not callable(found):
        raise UserError(
            f"{call.call} is of type {type(found).__name__} ({found!r:.80}), expected a function that takes the "
            "running stage. Correct `call`."
        )
    try:
        inspect.signature(found).bind(None)
    except TypeError as error:
        raise UserError(
            f"{call.call} cannot be called with one argument, the running stage ({error}). Write "
            f"`def {path}(stage)`; your settings are in stage.args."
        ) from None
    except ValueError:  # a function without a signature, of a C extension
        pass
    function: Callable[[RunningStage], Any] = found
    return function


def _returned(call: Call, returned: Any) -> PythonOutput:
    try:
        return PythonOutput.of(returned)
    except ValueError as error:
        raise UserError(f"{call.call} returned something else than facts: {error}.") from None


def _explained(error: Exception, call: Call, source: Path) -> UserError | InfrastructureError:
    """The error of ours for what the function raised."""
    ours = next((cause for cause in causes(error) if isinstance(cause, UserError | InfrastructureError)), None)
    if isinstance(ours, UserError):
        text = str(ours)
        return UserError(text if text.startswith(call.call) else f"{call.call}: {text}")
    lines = _own_lines(error, call, source)
    what = f"{call.call} raised {type(error).__name__}: {str(error).strip()[-_MAX_TEXT:] or 'no message'}"
    text = "\n".join([what, *lines, f"The whole traceback is in {call.artifact.url}/{LOG_FILE}."])
    if ours is not None or judge(error).fault in (Fault.TRANSIENT, Fault.FULL):
        return InfrastructureError(f"{text} The same command resumes: the stage's files are kept.")
    return UserError(f"{text} Correct the function, then run again.")


def _own_lines(error: Exception, call: Call, source: Path) -> list[str]:
    """The traceback as far as it is in the user's own modules, by the files in which the user wrote them."""
    written = {str(source / _relpath(module, file)): file for module, file in call.modules.items()}
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename in written:
        return [f"  {written[error.filename]}:{error.lineno}"]
    own = [frame for frame in frames if frame.filename in written][-_MAX_LINES:]
    return [f"  {written[frame.filename]}:{frame.lineno} in {frame.name}: {frame.line}" for frame in own]


def _relpath(module: str, file: str) -> str:
    is_package = Path(file).name == "__init__.py"
    return module.replace(".", "/") + ("/__init__.py" if is_package else ".py")


@contextmanager
def importable(source: Path, modules: Mapping[str, str]) -> Iterator[None]:
    """Let modules be imported from `source`, and forget them after: a worker process does several stages."""

    def forget() -> None:
        below = f"{source}/"
        for name, module in list(sys.modules.items()):
            if name in modules or str(getattr(module, "__file__", None) or "").startswith(below):
                del sys.modules[name]

    writes_bytecode = sys.dont_write_bytecode
    forget()
    sys.path.insert(0, str(source))
    importlib.invalidate_caches()
    sys.dont_write_bytecode = True  # the folder is part of the stage's result
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_bytecode
        sys.path.remove(str(source))
        forget()


@contextmanager
def _log_file(stage: str, file: Path) -> Iterator[logging.Logger]:
    """A logger that appends to `file`, and writes to this process's own output."""
    log = logging.Logger(f"bmojo.stage.{stage}", logging.INFO)  # of this call only: not in the tree of loggers
    handlers: list[logging.Handler] = [logging.FileHandler(file, encoding="utf-8"), logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    try:
        yield log
    finally:
        for handler in handlers:
            handler.close()
