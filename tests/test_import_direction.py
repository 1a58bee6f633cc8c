"""Imports point one way (docs/design/0001): between the packages, and between the layers inside pipelines/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "kernels": {"base"},
    "bmojo": {"base", "kernels"},
    "data": {"base"},
    "pipelines": {"base", "kernels", "bmojo", "data"},
}
ONLY_PIPELINES = {"ray", "mlflow", "deepspeed"}
LAYERS = (
    ("errors", "faults", "packages", "ray_errors", "redact"),
    ("storage",),
    ("tracking",),
    ("engine",),
    ("neuron",),
    ("stages",),
    (
        "config",
        "config_errors",
        "foreach",
        "loading",
        "preflight",
        "cluster",
        "cluster_process",
        "ray_cluster",
        "shared_storage",
        "session",
        "submit",
        "supervisor",
        "doctor",
        "neuron_doctor",
        "neuron_probe",
        "inspection",
        "memory",
        "serving",
    ),
    ("api",),
    ("cli",),
    ("__main__",),
    ("job_main",),
)
"""Modules and folders of pipelines/; each may import those of its own line and of the lines above."""


class Site(NamedTuple):
    """An import: where it stands, and the full name of what it imports."""

    file: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: imports {self.name}"


def imports_of(file: Path) -> Iterator[Site]:
    """Every import of a file, including those inside functions; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Site(file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (Site(file, node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def sites(package: str) -> list[Site]:
    found = [site for file in sorted((ROOT / package).rglob("*.py")) for site in imports_of(file)]
    assert found, f"no imports under {package}/"
    return [site._replace(file=site.file.relative_to(ROOT)) for site in found]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_is_below(package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    if package != "pipelines":
        forbidden |= ONLY_PIPELINES
    wrong = [str(site) for site in sites(package) if site.name.split(".")[0] in forbidden]
    assert not wrong, "\n".join(wrong)


def layer_of(name: str) -> int:
    """Number of the layer of a module of pipelines/, counted from the lowest."""
    part = name.split(".")[1]
    numbers = [number for number, layer in enumerate(LAYERS) if part in layer]
    assert numbers, f"{name} is in no layer: add pipelines/{part} to LAYERS"
    return numbers[0]


def test_layers_of_pipelines_import_only_what_is_below() -> None:
    wrong = []
    for site in sites("pipelines"):
        if site.name.startswith("pipelines."):
            importer = ".".join(site.file.with_suffix("").parts)
            if importer != "pipelines.__init__" and layer_of(importer) < layer_of(site.name):
                wrong.append(str(site))
    assert not wrong, "\n".join(wrong)


def test_parts_of_pipelines_form_no_cycle() -> None:
    """Also not within a layer: no two folders or modules at the top of pipelines/ need each other."""
    needs: dict[str, set[str]] = {}
    for site in sites("pipelines"):
        parts = site.name.split(".")
        if parts[0] == "pipelines" and len(parts) > 1 and len(site.file.parts) > 1:
            importer = site.file.with_suffix("").parts[1]
            if importer != parts[1]:
                needs.setdefault(importer, set()).add(parts[1])
    while needs:
        leaves = {part for part in needs if not needs[part] & set(needs)}
        assert leaves, f"these import each other in a circle: {sorted(needs)}"
        needs = {part: below for part, below in needs.items() if part not in leaves}


def test_imports_inside_functions_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "def function():\n    import ray.train\n    from mlflow import log_metric\n    from . import sibling\n"
    )
    assert [(site.line, site.name) for site in imports_of(file)] == [(2, "ray.train"), (3, "mlflow.log_metric")]
