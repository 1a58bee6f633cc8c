"""The model's source as flat files that transformers can load from a model directory, without this package.

transformers copies the files that `auto_map` names and the files these import by `from .name import ...`, all in one
folder. So every module that they need, directly or not, becomes one file beside it: `bmojo/mixers/ring.py` becomes
`bmojo_mixers_ring.py`, its imports rewritten, the rest as it stands. The files stay readable, as code that one is asked
to trust should be.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from bmojo.mixers import MIXERS

PACKAGES = ("base", "bmojo", "kernels")
TABLE = "bmojo.mixers"
OPTIONAL = ("triton",)  # imported only by what runs on a GPU
ENTRIES = {"bmojo.hf.modeling": "modeling_bmojo", "bmojo.hf.configuration": "configuration_bmojo"}  # for auto_map


def bundled_sources(mixers: Iterable[str]) -> dict[str, str]:
    """File name -> source of the entries and of all modules of our packages that models of these mixers need.

    Raises: ValueError: a module imports another in a way that cannot be rewritten (`import bmojo.x`).
    """
    modules = {MIXERS[name].__module__ for name in mixers}
    sources: dict[str, str] = {}
    for entry in ENTRIES:
        reached = _reached_from(entry, modules)
        others = sorted(_flat(module) for module in reached if module != entry)
        for module, source in reached.items():
            if module not in ENTRIES:
                sources[f"{_flat(module)}.py"] = source
        sources[f"{_flat(entry)}.py"] = reached[entry] + _imports_of_all(others)
    return dict(sorted(sources.items()))


def _reached_from(entry: str, mixers: set[str]) -> dict[str, str]:
    """Module -> flattened source, of a module and all that it imports, directly or not; of mixers only those named.

    Folders of other mixers differ in which files they hold, never in a file: transformers keeps the files of folders
    of one name together, and imports each once.
    """
    waiting, reached = [entry], dict[str, str]()
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached[module], needed = _flattened(module)
            waiting += needed
            if module == TABLE:
                reached[module] = _with_flat_names(reached[module])
                waiting += mixers
    return reached


def _with_flat_names(table: str) -> str:
    """The table of mixers imports by name: in the flat folder `bmojo_mixers_x`."""
    packaged = 'f"{__name__}.{module}"'
    if table.count(packaged) != 1:
        raise ValueError(f"{TABLE} no longer imports {packaged}, which is rewritten here.")
    return table.replace(packaged, 'f"{__name__}_{module}"')


def _flattened(module: str) -> tuple[str, list[str]]:
    """A module's source with relative imports, and the modules of ours that it imports."""
    text = _source_file(module).read_text(encoding="utf-8")
    lines, needed = text.splitlines(), list[str]()
    for node in sorted(_import_nodes(ast.parse(text)), key=lambda node: node.lineno, reverse=True):
        if _is_optional(node):
            indent, guarded = (
                " " * node.col_offset,
                ("try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"),
            )
            lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in guarded]
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if _is_ours(alias.name)]
            if ours:
                raise ValueError(
                    f"{module}, line {node.lineno}: write `from {ours[0]} import ...` instead of `import`."
                )
        elif node.level:
            raise ValueError(
                f"{module}, line {node.lineno}: relative imports are not rewritten; import from the package."
            )
        elif node.module and _is_ours(node.module):
            statements, modules = _relative(node.module, node.names)
            indent = " " * node.col_offset
            lines[node.lineno - 1 : node.end_lineno] = [indent + statement for statement in statements]
            needed += modules
    return "\n".join(lines) + "\n", needed


def _import_nodes(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def _is_optional(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import belongs into a `try`: transformers asks for every other package, even of files not imported."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return any(name.partition(".")[0] in OPTIONAL for name in names)


def _relative(module: str, names: list[ast.alias]) -> tuple[list[str], list[str]]:
    """`from module import names` as statements in the flat folder; names may be submodules."""
    statements, modules, attributes = [], [], []
    for alias in names:
        submodule = f"{module}.{alias.name}"
        if _is_module(submodule):
            modules.append(submodule)
            statements.append(f"from . import {_flat(submodule)} as {alias.asname or alias.name}")
        else:
            attributes.append(alias.name + (f" as {alias.asname}" if alias.asname else ""))
    if attributes:
        modules.append(module)
        statements.append(f"from .{_flat(module)} import {', '.join(attributes)}")
    return statements, modules


def _imports_of_all(names: list[str]) -> str:
    """Imports, never run: transformers copies a local directory's files only if this one imports them."""
    listed = "".join(f"    from .{name} import __doc__ as _doc  # noqa: F401\n" for name in names)
    return f"\n\nif False:  # so that transformers takes every file along\n{listed}"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def _source_file(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no source file of module {module}.")
    return Path(spec.origin)


def _flat(module: str) -> str:
    return ENTRIES.get(module) or module.replace(".", "_")
