"""The source code that a `python` stage runs: found, read and written down without importing it.

What counts is the module of `call`, those in `modules`, and every module that these import, directly or not, from the
same places: the stage's folder, the current one, and an installed package of `call` itself. Following imports keeps a
stage's result when a file beside it changes that it does not use. Other installed packages do not count, as for every
kind of stage; nor do those of this program, whose kinds have code versions.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from base.digest import digest_of
from base.errors import UserError
from data.paths import expanded
from pipelines.faults import explained_disk
from pipelines.packages import PACKAGES


@dataclass(frozen=True)
class SourceFile:
    """One module: its full name, its file here, the path it gets on other machines, and its content."""

    module: str
    path: Path
    relpath: str
    data: bytes


@dataclass(frozen=True)
class Sources:
    """All that a stage's function needs to be imported elsewhere."""

    files: tuple[SourceFile, ...]

    @property
    def digests(self) -> dict[str, str]:
        """What the fingerprint counts, in the words of a plan."""
        return {
            f"source of {file.module}": digest_of([file.relpath, sha256(file.data).hexdigest()]) for file in self.files
        }

    def write(self, folder: Path) -> None:
        """Make `folder` hold these files and nothing else."""
        shutil.rmtree(folder, ignore_errors=True)
        for file in self.files:
            target = folder / file.relpath
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.data)


class CallsFunction(Protocol):
    """Settings that name a function, such as PythonStageConfig."""

    @property
    def call(self) -> str: ...

    @property
    def modules(self) -> tuple[str, ...]: ...

    @property
    def folder(self) -> str | None: ...


def find_sources(config: CallsFunction, argument: str = "the running stage") -> Sources:
    """Find and read the modules of a function, and look for it in them.

    Args: argument: what the function is called with, for messages.
    Raises: UserError: a module or the function is not there, or a module is not valid Python.
    """
    places = _Places(config.folder)
    module, _, function = config.call.partition(":")
    found: dict[str, tuple[SourceFile, ast.Module]] = {}
    for field, name in [("call", module), *(("modules", name) for name in config.modules)]:
        places.require(name, field)
        _follow(name, places, found)
    _check_function(function, argument, *found[module])
    return Sources(tuple(found[name][0] for name in sorted(found)))


def _follow(name: str, places: _Places, found: dict[str, tuple[SourceFile, ast.Module]]) -> None:
    """Add a module, the packages around it, and what all of them import."""
    waiting = [name]
    while waiting:
        parts = waiting.pop().split(".")
        for module in accumulate(parts, lambda package, part: f"{package}.{part}"):
            path = None if module in found else places.file_of(module)
            if path is None:
                continue
            is_package = path.name == "__init__.py"
            relpath = module.replace(".", "/") + ("/__init__.py" if is_package else ".py")
            data, tree = _read(path)
            found[module] = SourceFile(module, path, relpath, data), tree
            waiting += _imports(tree, module if is_package else module.rpartition(".")[0])


def _read(path: Path) -> tuple[bytes, ast.Module]:
    with explained_disk(path):
        data = path.read_bytes()
    try:
        return data, ast.parse(data, str(path))
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        problem = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{path}{line}: not valid Python: {problem}. Correct this line.") from error


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Full names that a module imports, wherever in it; of `from a import b` both a and a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


class _Places:
    """Where modules may come from: folders, in order, and installed packages that a stage names."""

    def __init__(self, folder: str | None) -> None:
        here = Path.cwd()
        first = here / expanded(folder) if folder else here
        self.folders = tuple(dict.fromkeys([first.resolve(), here]))
        self._roots: dict[str, Path | None] = {}  # by the first part of a module's name

    def file_of(self, module: str) -> Path | None:
        """The file of a module; None if it has none, or does not count."""
        root = self._root(module.partition(".")[0])
        return None if root is None else _file_under(root, module)

    def require(self, module: str, field: str) -> None:
        """Raises: UserError: there is no such module of the user's; says where it was looked for."""
        top, _, below = module.partition(".")
        if top in PACKAGES or top in sys.stdlib_module_names:
            whose = "this program" if top in PACKAGES else "Python"
            raise UserError(
                f"{field}: {module!r} is the name of a module of {whose} itself. Rename your file, and {field} with it."
            )
        root = self._root(top)
        if root is None or _file_under(root, module) is None:
            root = self._installed(top) or root
        if root is None:
            near = difflib.get_close_matches(top, self._names(), 1)
            raise UserError(
                f"{field}: there is no module {top!r} in {' or '.join(map(str, self.folders))}, and no installed "
                f"package of that name.{f' Did you mean {near[0]!r}?' if near else ''} Put {top}.py there, or name its "
                "folder with `folder`."
            )
        self._roots[top] = root
        if _file_under(root, module) is None:
            what = f"package {top!r} in {root} has no module {below!r}" if below else f"{root / top} is no module"
            raise UserError(f"{field}: the {what} with Python source. Expected {root / module.replace('.', '/')}.py.")

    def _root(self, top: str) -> Path | None:
        """The folder in which a module at the top lies, if it is one of ours to look into."""
        if top in PACKAGES or top in sys.stdlib_module_names:
            return None
        if top not in self._roots:
            whole = (folder for folder in self.folders if _file_under(folder, top))
            # without an __init__.py a folder is a package as well, but only if no other is found
            part = (folder for folder in self.folders if (folder / top).is_dir())
            self._roots[top] = next(whole, None) or next(part, None)
        return self._roots[top]

    def _installed(self, top: str) -> Path | None:
        try:
            spec = importlib.util.find_spec(top)  # of a name without dots, which imports nothing
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        if spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations))).parent
        return Path(spec.origin).parent if spec.origin else None

    def _names(self) -> Sequence[str]:
        return [path.stem for folder in self.folders if folder.is_dir() for path in folder.glob("*.py")]


def _file_under(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split("."))
    candidates = (base / "__init__.py", base.with_name(f"{base.name}.py"))
    return next((path for path in candidates if path.is_file()), None)


def _check_function(function: str, argument: str, file: SourceFile, tree: ast.Module) -> None:
    """Refuse what cannot be called with one argument, as far as the source says it.

    Raises: UserError: the module does not define it, or it takes other arguments.
    """
    first, _, below = function.partition(".")
    names = dict(_defined(tree.body))
    if "*" in names or "__getattr__" in names:
        return  # defined elsewhere, perhaps; the task will see
    if first not in names:
        known = [name for name, node in names.items() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        near = difflib.get_close_matches(first, known, 1)
        raise UserError(
            f"call: {file.path} has no {first!r}. "
            + (f"Did you mean {near[0]!r}?" if near else f"Its functions: {', '.join(known) or 'none'}.")
        )
    node = names[first]
    if below or not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults) + arguments.kw_defaults.count(None)
    if required > 1 or not (positional or arguments.vararg):
        raise UserError(
            f"{file.path}:{node.lineno}: {first}({ast.unparse(arguments)}) is called with one argument, {argument}. "
            f"Write `def {first}({argument.split()[-1]})`"
            + ("; your settings are in stage.args." if argument.endswith("stage") else ".")
        )


def _defined(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Names that statements define at their own level, also inside `if`, `try` and `with`."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name, statement
            continue
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name.partition(".")[0], statement) for alias in statement.names)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id, node
        for inner in ("body", "orelse", "finalbody", "handlers"):
            for part in getattr(statement, inner, []):
                yield from _defined(part.body if isinstance(part, ast.ExceptHandler) else [part])
