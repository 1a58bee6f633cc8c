"""Ask a process of its own (lowering_child.py) to lower a model's graphs, and read what became of each."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bmojo import ModelConfig

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-neuron" / "bin" / "python"
"""Of the environment that `make test-neuron` builds: torch-mlir and jax beside the main one's packages."""
MEMORY_BYTES = 24 << 30  # address space, of which torch and XLA reserve far more than they use
Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Request:
    """What to lower: in bfloat16 graphs alone, in float32 also with numbers that XLA's must agree with."""

    model: dict[str, Any]
    seq_len: int
    batch: int
    documents: bool
    precisions: Sequence[Precision]
    memory_bytes: int = MEMORY_BYTES


@dataclass(frozen=True)
class Lowered:
    """What became of a graph. bytes: of its StableHLO as text.  error: of XLA's outputs, relative to the largest
    number of each; None: it was not run.  failure: what torch-mlir or XLA said."""

    graph: str
    precision: Precision
    nodes: int
    seconds: float
    bytes: int | None = None
    error: float | None = None
    failure: str | None = None


class LoweringError(RuntimeError):
    """The process ended before it had reported on every graph."""


def lower(
    config: ModelConfig,
    seq_len: int,
    batch: int,
    *,
    documents: bool = True,
    precisions: Sequence[Precision] = ("bfloat16", "float32"),
    python: Path = PYTHON,
    memory_bytes: int = MEMORY_BYTES,
) -> list[Lowered]:
    """Lower and run every graph of a model.

    Raises: FileNotFoundError: there is no such environment. LoweringError: torch-mlir crashed, or ran out of memory.
    """
    if not python.exists():
        raise FileNotFoundError(f"{python} does not exist. It has torch-mlir and jax; `make neuron-checks` builds it.")
    request = Request(config.model_dump(mode="json"), seq_len, batch, documents, precisions, memory_bytes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(asdict(request)), encoding="utf-8")
        command = [str(python), "-m", "pipelines.neuron.checks.lowering_child", str(file)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [Lowered(**json.loads(line)) for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode:
        said = "\n".join(ended.stderr.splitlines()[-5:])
        raise LoweringError(
            f"the process that lowers graphs ended with {ended.returncode} after {len(lines)} of them; it said:\n{said}"
        )
    return lines
