"""flash-linear-attention's kernels, recorded at the sizes of our report cases and compiled like ours.

Which configuration its autotuner would take is known on a GPU only. All are compiled; the row is one that fits and
spills least, and of these the one with which most warps share a processor.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_report import comparison, table
from benchmarks.kernel_report.cases import Case, cases
from benchmarks.kernel_report.comparison import PeerRow
from benchmarks.kernel_report.compiled import Code, compile_launch
from benchmarks.kernel_report.occupancy import occupancy
from benchmarks.kernel_report.recorder import operand_bytes, pretended, recorded
from benchmarks.kernel_report.rows import plain
from benchmarks.kernel_report.targets import TARGETS, Target
from kernels.gpu.launch import Launch

BATCH, TOKENS = 8, 4096  # as in the operators' report cases
OPERATORS = ("causal_conv1d", "memory_attention", "ssd_scan")
NOT_INSTALLED = """\
error: flash-linear-attention's kernels are not installed, so there is nothing to compare with. Install them:
    pip install -e '.[bench]'"""

Call = Callable[[], Tensor]


def report(architectures: Sequence[str], operators: Sequence[str], folder: Path) -> int:
    """Write peers.md; one process per target, because the peer asks for its device when imported."""
    if importlib.util.find_spec("fla") is None:
        print(NOT_INSTALLED, file=sys.stderr)
        return 2
    rows: list[PeerRow] = []
    for arch in architectures:
        names = (name for name in OPERATORS if name in operators)
        command = [sys.executable, "-m", "benchmarks.kernel_report.peers", arch, *names]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        rows += [comparison.from_json(row) for row in json.loads(done.stdout)]
    where = table.environment() | {"fla-core": importlib.metadata.version("fla-core")}
    print(table.write(folder, "peers", comparison.as_markdown(rows, where)))
    return 0


def main(arch: str, *operators: str) -> None:
    """Compile ours and the peer's for one target and print the rows as JSON."""
    target = TARGETS[arch]
    rows = list(_ours(target, operators))
    os.environ["FLA_CACHE_MODE"] = "disabled"  # configurations are the autotuner's, not those of a cache
    with pretended(target):
        calls = peer_calls(target)
        for operator in operators:
            for size, call in calls[operator]():
                rows += _theirs(target, operator, size, call)
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


def peer_calls(target: Target) -> dict[str, Callable[[], Iterator[tuple[str, Call]]]]:
    """Sizes and calls of the peer, by operator. Imported here: the device is pretended by now."""
    import fla.utils.hardware
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.attn import parallel_attn
    from fla.ops.simple_gla import chunk_simple_gla

    # Looked up by the tensor's device index, which is None for a meta tensor.
    fla.utils.hardware.get_all_max_shared_mem = lambda: defaultdict(lambda: target.max_shared_bytes)

    def conv() -> Iterator[tuple[str, Call]]:
        weight_dk = torch.empty(4096, 4, dtype=torch.bfloat16, device="meta", requires_grad=True)
        yield "", lambda: causal_conv1d(_leaf(4096), weight_dk, activation="silu")[0]

    def attention() -> Iterator[tuple[str, Call]]:
        for p in (64, 128):
            q, k, v = _leaf(16, p), _leaf(4, p), _leaf(4, p)
            yield f", head_dim {p}, window only", partial(parallel_attn, q, k, v, window_size=512)

    def scan() -> Iterator[tuple[str, Call]]:
        decay_bth = torch.empty(BATCH, TOKENS, 32, device="meta", requires_grad=True)

        def output(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return chunk_simple_gla(q, k, v, decay_bth)[0]

        for n in (64, 128):
            q, k, v = _leaf(32, n), _leaf(32, n), _leaf(32, 64)
            yield f", d_state {n}", partial(output, q, k, v)

    return {"causal_conv1d": conv, "memory_attention": attention, "ssd_scan": scan}


def window_only(arch: str) -> Iterator[Case]:
    """memory_attention without fading and eidetic memory, which no peer has."""
    from kernels.memory_attention.reference import FlatInputs
    from kernels.memory_attention.triton_plan import Saved, SetGradients, new_lse, plan_backward, plan_forward

    for p in (64, 128):
        q, k = _leaf(16, p), _leaf(4, p)
        lse, delta = new_lse(q), new_lse(q)
        absent = (None,) * 5
        inputs = FlatInputs(q, k, k, *absent, None, None, 512, TOKENS, 0, p**-0.5)
        grads = SetGradients(q, k, k, *absent)
        backward = plan_backward(inputs, Saved(q, lse, q, delta), grads, arch)
        yield Case("memory_attention", f"forward, head_dim {p}, window only", tuple(plan_forward(inputs, q, lse, arch)))
        yield Case("memory_attention", f"backward, head_dim {p}, window only", tuple(backward))


def _ours(target: Target, operators: Sequence[str]) -> Iterator[PeerRow]:
    for operator in operators:
        ours = [*cases(operator, target.name), *(window_only(target.name) if operator == "memory_attention" else ())]
        for case in ours:
            yield from (_best(target, operator, "ours", case.name, [launch]) for launch in case.launches)


def _theirs(target: Target, operator: str, size: str, call: Call) -> Iterator[PeerRow]:
    """Forward and backward; each kernel in all the configurations that would be tried."""
    with recorded(target) as calls:
        out = call()
        forward = list(calls)
        out.backward(torch.empty_like(out))
        backward = calls[len(forward) :]
    for name, passes in (("forward", forward), ("backward", backward)):
        yield from (_best(target, operator, "fla", name + size, tried) for tried in passes)


def _best(target: Target, operator: str, library: str, case: str, tried: list[Launch]) -> PeerRow:
    results = [_compile(launch, target) for launch in tried]
    codes = [result for result in results if isinstance(result, Code)]
    best = min(range(len(tried)), key=lambda i: _rank(results[i], target))
    launch, result = tried[best], results[best]
    row = PeerRow(
        target=target.name, operator=operator, library=library, case=case, kernel=launch.name, tried=len(tried),
        spilling=sum(code.spilled_bytes > 0 for code in codes),
        registers=_range(code.registers for code in codes),
        shared_bytes=_range(code.shared_bytes for code in codes),
        constants={name: plain(value) for name, value in launch.constants.items()},
        num_warps=launch.num_warps, num_stages=launch.num_stages, bytes=operand_bytes(launch.args),
        code=result if isinstance(result, Code) else None, error="" if isinstance(result, Code) else result,
    )  # fmt: skip
    print(f"{row.label}: {row.tried} configurations, {row.spilling} spill", file=sys.stderr, flush=True)
    return row


def _rank(result: Code | str, target: Target) -> tuple[int, int, int]:
    """Lower is shown: what compiles and fits, spills least, leaves room for most warps."""
    if not isinstance(result, Code):
        return 2, 0, 0
    warps = occupancy(result, target).warps
    return int(warps == 0), result.spilled_bytes, -warps


def _range(numbers: Iterable[int]) -> tuple[int, int]:
    known = sorted(numbers) or [0]
    return known[0], known[-1]


def _compile(launch: Launch, target: Target) -> Code | str:
    try:
        return compile_launch(launch, target)
    except Exception as failure:  # one configuration of many; the table says so if none compiles
        return f"{type(failure).__name__}: {failure}"


def _leaf(*shape: int) -> Tensor:
    return torch.empty(BATCH, TOKENS, *shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
