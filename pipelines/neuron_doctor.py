"""The first hour on a Trainium instance, as `bmojo doctor --neuron` walks through it: one step after the other.

First the graphs, which need no hardware. A core belongs to one process until that process ends, so each further step is
a process or two of its own (pipelines/neuron_probe.py). One that fails says what it may be and what to do.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmojo.config import ModelConfig
from pipelines.doctor import Check

_TIMEOUT_S = 3600.0  # the first compilation of a block has taken many minutes elsewhere
_FP32_ERROR, _BF16_ERROR = 1e-3, 5e-2
"""Largest relative errors of a gradient against the CPU's in float32."""
_WORDS = 400  # of what a process that failed printed last
GRAPHS = "graphs of one block"
_NOT_ONE_GRAPH = "The versions of torch differ from those that were tested (constraints.txt): send this line and both."
_DENIED = "Nothing here asks the device. See pipelines/neuron/checks/op_table.toml, and send this line."
_NOT_LOWERED = "Optional, needs no hardware: `make neuron-checks` builds an environment with torch-mlir and XLA."


@dataclass(frozen=True)
class ProbeSpec:
    """What the steps compute with. Defaults are a block of a model of about 100M parameters."""

    pattern: str = "(bmojo)*1"
    d_model: int = 768
    num_heads: int = 12
    window_size: int = 512
    chunk_size: int = 64
    num_eidetic: int = 64
    d_state: int = 64
    ssm_head_dim: int = 64
    vocab_size: int = 4096
    seq_len: int = 1024
    rows: int = 1
    num_steps: int = 20

    def model(self) -> dict[str, Any]:
        """The settings of the model."""
        rest = ("seq_len", "rows", "num_steps")
        return {name: value for name, value in vars(self).items() if name not in rest}


@dataclass(frozen=True)
class Step:
    """One line of the list. judge: from what the ranks found, None if all is well, else what is not."""

    name: str
    probe: str
    num_ranks: int
    found: Callable[[Mapping[str, Any]], str]
    advice: str
    judge: Callable[[Mapping[str, Any]], str | None] = field(default=lambda found: None)


STEPS: tuple[Step, ...] = (
    Step(
        "device", "device", 1, lambda found: f"{found['device']}: 2 + 2 = {found['sum']:g}",
        "No device: not a trn2 or trn3 instance, driver not loaded (lsmod | grep neuron), or the core is held by "
        "another process (neuron-top). Unknown process group: another torch_neuronx than documented; send its error.",
        lambda found: None if found["sum"] == 4 else "the sum is wrong",
    ),
    Step(
        "compile one block", "compile", 1,
        lambda found: f"forward and backward in {found['first_s']:.1f} s, then {found['then_s'] * 1e3:.1f} ms",
        "NCC errors or SBUF overflow: try chunk_size 64, fewer heads, and backend.compile: none to see whether "
        "operators run; send the compiler's log (TORCH_NEURONX_DEBUG_DIR, /tmp/neuron_backend). Minutes are expected "
        "once; later starts read TORCH_NEURONX_NEFF_CACHE_DIR.",
        lambda found: f"on the host's CPU: {', '.join(found['fallback'])}" if found["fallback"] else None,
    ),
    Step(
        "numerics against the CPU", "numerics", 1,
        lambda found: (
            f"loss off by {found['loss']:.1e}; worst gradient: fp32 {found['fp32']:.1e} ({found['fp32_name']}), bf16 "
            f"{found['bf16']:.1e} ({found['bf16_name']}), three micro batches {found['three']:.1e}"
        ),
        "One parameter alone: the operator that reads it; run BMOJO_KERNELS=static on a CPU to rule the model out. "
        "Three micro batches alone: gradients are scaled inside a graph. Send the line and both versions.",
        lambda found: _too_far(found),
    ),
    Step(
        "all-reduce on two cores", "collective", 2,
        lambda found: f"sums and gathers of {found['num_ranks']} ranks",
        "Hangs: both processes have one core; look at NEURON_RT_VISIBLE_CORES and NEURON_RT_ROOT_COMM_ID. Refused: the "
        "runtime was started before the process group. A machine with one core: expected.",
        lambda found: None if found["is_right"] else "a sum is wrong",
    ),
    Step(
        "throughput of 20 steps", "throughput", 1,
        lambda found: (
            f"{found['tokens_per_s']:,.0f} tokens/s, loss {found['first_loss']:.3f} to {found['last_loss']:.3f}, "
            f"{found['graphs_after_warm_up']} graphs compiled after the second step"
        ),
        "Falling tokens/s: graphs are compiled again (shapes) or operators fall back. A loss that does not fall: see "
        "the numerics. Unpinned host processes have halved it elsewhere (numactl).",
        lambda found: _went_wrong(found),
    ),
)  # fmt: skip


def run_first_hour(spec: ProbeSpec | None = None) -> Iterator[Check]:
    """The graphs, the package, then every step; after one that cannot run, the others are tried all the same."""
    from pipelines.neuron import runtime

    yield _graphs(spec or ProbeSpec())
    try:
        runtime.require()
    except runtime.NeuronUnavailableError as error:
        yield Check("TorchNeuron", "error", "cannot be used", str(error))
        return
    cores = runtime.num_cores()
    yield Check(
        "TorchNeuron",
        "ok",
        f"torch-neuronx {runtime.version()}, Python {platform.python_version()}, {cores} logical cores by neuron-ls",
        "" if cores else "neuron-ls was not found or lists nothing: install aws-neuronx-tools.",
    )
    for step in STEPS:
        yield _check(step, spec or ProbeSpec())


def _graphs(spec: ProbeSpec) -> Check:
    """What the compiler will be given of the block, as far as a CPU can tell."""
    from pipelines.neuron.checks.report import report_graphs

    try:
        report = report_graphs(ModelConfig.model_validate(spec.model()), spec.seq_len, spec.rows)
    except Exception as error:  # of torch.compile, for whoever reads the table
        return Check(GRAPHS, "error", f"{type(error).__name__}: {_last_words(str(error))}", _NOT_ONE_GRAPH)
    if report.problems:
        return Check(GRAPHS, "error", f"{report}; {'; '.join(report.problems)}"[:_WORDS], _DENIED)
    return Check(GRAPHS, "ok", str(report), "" if report.lowered else _NOT_LOWERED)


def _check(step: Step, spec: ProbeSpec) -> Check:
    try:
        found = _run(step, spec)
    except _ProbeError as error:
        return Check(step.name, "error", str(error), step.advice)
    problem = step.judge(found)
    text = step.found(found)
    return Check(step.name, "ok", text) if problem is None else Check(
        step.name, "error", f"{text}; {problem}", step.advice
    )  # fmt: skip


class _ProbeError(Exception):
    """A process of a step failed; the message is the end of what it printed."""


def _run(step: Step, spec: ProbeSpec) -> Mapping[str, Any]:
    """What rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bmojo-neuron-") as name:
        folder = Path(name)
        processes = [_start(step, spec, rank, port, folder) for rank in range(step.num_ranks)]
        try:
            outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in processes]
        except subprocess.TimeoutExpired:
            raise _ProbeError(f"took more than {_TIMEOUT_S:g} s") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for process, output in zip(processes, outputs, strict=True):
            if process.returncode:
                raise _ProbeError(_last_words(output) or f"ended with {process.returncode}")
        found: Mapping[str, Any] = json.loads((folder / "rank-0.json").read_text())
        return found


def _start(step: Step, spec: ProbeSpec, rank: int, port: int, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.neuron_probe", step.probe, json.dumps(vars(spec)), str(folder)]
    place = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(step.num_ranks),
        "LOCAL_WORLD_SIZE": str(step.num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **place}
    )


def _last_words(output: str) -> str:
    lines: Sequence[str] = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][-_WORDS:] if lines else ""


def _too_far(found: Mapping[str, Any]) -> str | None:
    limits = {"loss": _FP32_ERROR, "fp32": _FP32_ERROR, "three": _FP32_ERROR, "bf16": _BF16_ERROR}
    far = [f"{name} above {limit:g}" for name, limit in limits.items() if not found[name] <= limit]
    return "; ".join(far) or None


def _went_wrong(found: Mapping[str, Any]) -> str | None:
    if not found["last_loss"] < found["first_loss"]:
        return "the loss of the same batch did not fall"
    return "graphs were compiled again" if found["graphs_after_warm_up"] else None
