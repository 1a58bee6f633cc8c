"""Operators on a GPU against flash-linear-attention, flex_attention and SDPA: forward and backward, as ratios.

First each operator is compared with its reference on the same device, outputs and all gradients, and so is the output
of every peer that computes the same; no figure is given if one differs. Needs a CUDA or ROCm device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks._kernel_cases import GATE, REPORT, Case, Implementation, Sizes, cases
from benchmarks.kernel_report.table import environment
from kernels.operator import use

# Relative to the root mean square of the reference, which has float32 inputs of the same values. float32: products may
# be summed in another order. bfloat16: inputs and results have 8 bits, probabilities and states in between as well.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
TIMED = torch.bfloat16
NO_GPU = """\
error: there is no GPU here ({reason}), and times of Triton kernels on anything else mean nothing.
  Without one there are `make kernel-report` (registers, spills, rooflines) and `python -m pytest tests/kernels`."""

METHOD = """\
Results agreed with the reference first. Times are of single calls, the L2 cache flushed before each: the median, and
the 10th to 90th percentile. A ratio above 1: ours is faster. flex_attention is compiled; joining its keys and making
its mask are not timed.
"""


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one pass of one implementation."""

    operator: str
    case: str
    direction: str
    implementation: str
    note: str
    median_ms: float
    low_ms: float
    high_ms: float


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.device != "cuda" or not torch.cuda.is_available():
        reason = "torch.cuda.is_available() is false" if options.device == "cuda" else f"--device {options.device}"
        print(NO_GPU.format(reason=reason), file=sys.stderr)
        return 2
    if importlib.util.find_spec("fla") is None:
        print("flash-linear-attention is not installed and left out: pip install -e '.[bench]'", file=sys.stderr)
    torch._functorch.config.donated_buffer = False  # or a compiled backward cannot be timed twice
    wrong = gate(options.device, GATE, options.operator, compiled=True)
    if wrong:
        print("error: no times, because results differ from the reference:", *wrong, sep="\n- ", file=sys.stderr)
        return 1
    measurements = list(measure(options.operator, options.repeat_ms))
    where = {**environment(), "device": torch.cuda.get_device_name()}
    for file in write(options.output, measurements, where):
        print(file)
    return 0


def gate(device: str, sizes: Sizes, operators: Sequence[str], *, compiled: bool) -> list[str]:
    """What differs from the reference by more than its tolerance: nothing, if all is well."""
    return [
        problem
        for dtype in TOLERANCE
        for case in cases(sizes, device, dtype, compiled=compiled)
        if case.operator in operators
        for problem in _differences(case, dtype)
    ]


def _differences(case: Case, dtype: torch.dtype) -> Iterator[str]:
    with use("reference"):
        precise = Implementation("reference", tuple(_float32(leaf) for leaf in case.ours.leaves), case.ours.call)
        want = _results(precise, case.has_backward)
    with use("triton"):
        got = _results(case.ours, case.has_backward)
    names = ["output", *(f"gradient {i}" for i in range(1, len(got)))]
    compared = [(f"ours, {name}", *pair) for name, *pair in zip(names, want, got, strict=True)]
    if dtype == TIMED:  # in float32 some peers round their products to 11 bits
        compared += [(peer.name, want[0], _output(peer)) for peer in case.peers if peer.exact]
    for name, expected, actual in compared:
        error = relative_error(actual, expected)
        if not error <= TOLERANCE[dtype]:  # NaN too
            yield f"{case.operator}, {case.name}, {dtype}: {name}: relative error {error:.2g} > {TOLERANCE[dtype]}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference against that of what is expected; of indices, whether one differs."""
    if not expected.is_floating_point():
        return float(not torch.equal(actual, expected))
    expected = expected.float()
    return ((actual.float() - expected).square().mean() / expected.square().mean().clamp_min(1e-12)).sqrt().item()


@torch.no_grad()
def _output(implementation: Implementation) -> Tensor:
    return implementation.call(*(leaf.detach() for leaf in implementation.leaves))


def _results(implementation: Implementation, has_backward: bool) -> list[Tensor]:
    """Output, and the gradient of every leaf for a fixed cotangent."""
    out = implementation.call(*implementation.leaves)
    if not has_backward:
        return [out]
    generator = torch.Generator(out.device).manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, implementation.leaves, cotangent)]


def _float32(leaf: Tensor) -> Tensor:
    return leaf.detach().float().requires_grad_(leaf.requires_grad)


def measure(operators: Sequence[str], repeat_ms: int) -> Iterator[Measurement]:
    for sizes in REPORT:
        for case in cases(sizes, "cuda", TIMED, compiled=True):
            if case.operator not in operators:
                continue
            for implementation in (case.ours, *case.peers):
                for direction, call in passes(implementation, case.has_backward).items():
                    try:
                        times_ms = _times_ms(call, repeat_ms)
                    except RuntimeError as error:
                        if implementation is case.ours:
                            raise
                        print(f"left out: {implementation.name}, {case.name}, {direction}: {error}", file=sys.stderr)
                        continue
                    yield measurement(case, direction, implementation, times_ms)


def passes(implementation: Implementation, has_backward: bool) -> dict[str, Callable[[], object]]:
    """What is timed: the forward that prepares a backward, and the backward alone."""
    leaves = implementation.leaves
    calls: dict[str, Callable[[], object]] = {"forward": lambda: implementation.call(*leaves)}
    if has_backward:
        out = implementation.call(*leaves)
        cotangent = torch.randn_like(out)
        calls["backward"] = lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    return calls


def measurement(case: Case, direction: str, implementation: Implementation, times_ms: Sequence[float]) -> Measurement:
    low, *_, high = statistics.quantiles(times_ms, n=10)
    return Measurement(
        case.operator, case.name, direction, implementation.name, implementation.note,
        statistics.median(times_ms), low, high,
    )  # fmt: skip


def _times_ms(call: Callable[[], object], repeat_ms: int) -> list[float]:
    """Times of single calls by CUDA events, with the L2 cache flushed before each."""
    from triton.testing import do_bench

    return list(do_bench(call, warmup=repeat_ms // 4, rep=repeat_ms, return_mode="all"))


def as_markdown(measurements: Sequence[Measurement], where: dict[str, str]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in where.items() if name not in ("date", "device"))
    lines = [
        f"# Kernels on {where['device']} ({where['date']})\n",
        f"Command: `python -m benchmarks.kernels --device cuda`. {versions}. bfloat16.",
        METHOD,
        "| operator | case | pass | implementation | ms | 10 % .. 90 % | ours is x times as fast | note |",
        "| --- | --- | --- | --- | --: | --- | --: | --- |",
    ]
    ours_ms = {_key(m): m.median_ms for m in measurements if m.implementation == "ours"}
    for m in measurements:
        ratio = "" if m.implementation == "ours" else f"{m.median_ms / ours_ms[_key(m)]:.2f}"
        lines.append(
            f"| {m.operator} | {m.case} | {m.direction} | {m.implementation} | {m.median_ms:.3f} | "
            f"{m.low_ms:.3f} .. {m.high_ms:.3f} | {ratio} | {m.note} |"
        )
    return "\n".join(lines) + "\n"


def write(folder: Path, measurements: Sequence[Measurement], where: dict[str, str]) -> list[Path]:
    """kernels_DATE.md and .json."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"kernels_{where['date']}"
    document = {**where, "measurements": [asdict(m) for m in measurements]}
    texts = {".md": as_markdown(measurements, where), ".json": json.dumps(document, indent=1) + "\n"}
    files = [stem.with_suffix(suffix) for suffix in texts]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def _key(m: Measurement) -> tuple[str, str, str]:
    return m.operator, m.case, m.direction


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    operators = ["causal_conv1d", "ssd_scan", "memory_attention", "innovation_select"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", default="cuda", help="where to run; only cuda (ROCm too) gives times")
    parser.add_argument("--operator", nargs="+", choices=operators, default=operators, help="default: all")
    parser.add_argument("--repeat-ms", type=int, default=200, help="how long each call is repeated")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder for the dated results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
