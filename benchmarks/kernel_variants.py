"""Configurations of memory attention's and the SSD scan's kernels on a GPU: each is checked, then timed.

Every configuration runs first in a process of its own, all at once, and is compared with plain torch at full size and
with itself: one that is wrong, does not compile or hangs is left out, and said so. Then one process times the others.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks._kernel_cases import Sizes, random_slots
from benchmarks.kernels import relative_error
from kernels.gpu.launch import Launch
from kernels.gpu.tuning import Config
from kernels.memory_attention import Eidetic, KeysValues, memory_attention, triton_path, triton_plan
from kernels.memory_attention.reference import FlatInputs
from kernels.memory_attention.triton_plan import Saved, new_lse
from kernels.operator import use
from kernels.ssd_scan import ssd_scan
from kernels.ssd_scan import triton_path as scan_path
from kernels.ssd_scan import triton_plan as scan_plan
from kernels.ssd_scan.reference import ScanInputs

DEVICE = "cuda"
TOLERANCE = {True: 4e-2, False: 2e-2}  # bfloat16, of the root mean square: of the scan, of attention
SIZES = Sizes(4, 8192, 0, 12, 12, 64, 512, 128, 64, 12, 64, 128)  # a layer of 116M parameters
tile = triton_plan._config
WIDE = {**scan_plan._WIDE, "GROUP_N": 128}


@dataclass(frozen=True)
class Variant:
    """A configuration of one kernel; the others keep their defaults."""

    kernel: str
    config: Config

    @property
    def name(self) -> str:
        tiles = " ".join(f"{name} {size}" for name, size in self.config.tiles.items() if name not in SAID_ELSEWHERE)
        return (
            f"{self.kernel}: {tiles}, {self.config.num_warps} x {self.config.num_stages}, {self.config.max_registers}"
        )


SAID_ELSEWHERE = ("STATE_P", "STATE_N", "CHUNK")


def variants() -> list[Variant]:
    """The defaults first."""
    known = triton_plan.CONFIGS
    attention = {  # and without limits on registers
        "forward": [*known["forward"]["sm_90"][128], tile(64, 64, 4, 2), tile(128, 64, 8, 3, 128)],
        "query_grad": [*known["query_grad"]["sm_90"][128], tile(64, 64, 4, 3)],
        "key_grad": known["key_grad"]["sm_90"][128],
    }
    found = [Variant(kernel, config) for kernel, configs in attention.items() for config in configs]
    backward = [*scan_plan.BACKWARD_CONFIGS["sm_90"], Config({**WIDE, "WALKS": 792}, 4, 2)]
    found += [Variant("scan_backward", config) for config in backward]
    return found + [Variant("scan_forward", config) for config in scan_plan.FORWARD_CONFIGS["sm_90"]]


def attention_leaves(documents: bool = False) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """q, k, v, fading k, v, eidetic q, k; the slots; document ids."""
    s = SIZES
    torch.manual_seed(0)

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(s.batch, rows, heads, s.head_dim, device=DEVICE).bfloat16()

    rows = (s.t, s.t, s.t, s.t - s.window, s.t - s.window, s.t, s.t)
    leaves = [normal(n, s.heads).requires_grad_() for n in rows]
    docs = (torch.rand(s.batch, s.t, device=DEVICE) < 1 / 1500).cumsum(1) if documents else None
    return leaves, random_slots(s, torch.device(DEVICE)), docs


def attend(leaves: list[Tensor], index: Tensor, docs: Tensor | None) -> Tensor:
    q, k, v, fading_k, fading_v, far_q, far_k = leaves
    eidetic = Eidetic(far_q, far_k, v, index)
    return memory_attention(
        q, k, v, KeysValues(fading_k, fading_v), eidetic, window_size=SIZES.window, chunk_size=SIZES.chunk,
        doc_ids_bt=docs,
    )  # fmt: skip


def scan_leaves() -> list[Tensor]:
    s = SIZES
    torch.manual_seed(0)
    x, B, C = (
        torch.randn(s.batch, s.t, heads, n, device=DEVICE).bfloat16()
        for heads, n in ((s.ssm_heads, s.ssm_head_dim), (1, s.d_state), (1, s.d_state))
    )
    dt = torch.nn.functional.softplus(torch.randn(s.batch, s.t, s.ssm_heads, device=DEVICE) - 3)
    A, D = -torch.rand(s.ssm_heads, device=DEVICE) - 0.5, torch.ones(s.ssm_heads, device=DEVICE)
    return [x.requires_grad_() for x in (x, dt, A, B * s.d_state**-0.5, C, D)]


def picks(variant: Variant) -> Any:
    """Within, a kernel has the variant's configuration."""
    if variant.kernel.startswith("scan"):
        name = f"ssd_{variant.kernel}"
        chosen = scan_path.choose
        return mock.patch.object(
            scan_path, "choose", lambda op, *args: variant.config if op == name else chosen(op, *args)
        )
    pick = triton_plan.pick
    return mock.patch.object(
        triton_plan, "pick", lambda kernel, *args: variant.config if kernel == variant.kernel else pick(kernel, *args)
    )


def check(variant: Variant) -> None:
    """Raise ValueError if results differ from plain torch's, or from run to run."""
    if variant.kernel.startswith("scan"):
        _compare(variant, scan_leaves(), lambda leaves: ssd_scan(*leaves)[0])
        return
    for documents in (False, True):
        leaves, index, docs = attention_leaves(documents)
        _compare(variant, leaves, lambda leaves, index=index, docs=docs: attend(leaves, index, docs))


def _compare(variant: Variant, leaves: list[Tensor], call: Callable[[list[Tensor]], Tensor]) -> None:
    def results(path: str, leaves: list[Tensor]) -> list[Tensor]:
        with use(path):
            out = call(leaves)
            cotangent = torch.randn(out.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
            return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.bfloat16().to(out.dtype))]

    want = results("torch", [x.detach().float().requires_grad_() for x in leaves])
    with picks(variant):
        got, again = results("triton", leaves), results("triton", leaves)
    errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
    if not max(errors) <= TOLERANCE[variant.kernel.startswith("scan")]:
        raise ValueError(f"wrong: {', '.join(f'{error:.1e}' for error in errors)}")
    if not all(map(torch.equal, got, again)):
        raise ValueError("a second run has other bits")


def survivors(cap_s: float) -> Iterator[tuple[Variant, str]]:
    """Each variant and what was wrong with it, empty if nothing was."""

    def run(number: int) -> str:
        command = [sys.executable, "-m", "benchmarks.kernel_variants", "--check", str(number)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=cap_s)
        except subprocess.TimeoutExpired:
            return f"not done after {cap_s:.0f} s"
        return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1][:200]

    found = variants()
    with ThreadPoolExecutor(24) as pool:
        yield from zip(found, pool.map(run, range(len(found))), strict=True)


def launches(variant: Variant) -> list[Launch]:
    """Those of the variant's kernel; of a scan all launches of the pass."""
    if variant.kernel.startswith("scan"):
        inputs = ScanInputs(*(x.detach() for x in scan_leaves()), None, None)
        if variant.kernel == "scan_forward":
            return scan_plan.plan_forward(inputs, variant.config).launches
        return scan_plan.plan_backward(torch.randn_like(inputs.x_bthp), None, inputs, variant.config).launches
    leaves, index, _ = attention_leaves()
    inputs = flat_inputs([x.detach() for x in leaves], index)
    out, lse = torch.empty_like(inputs.q), new_lse(inputs.q)
    with picks(variant):
        forward = triton_plan.plan_forward(inputs, out, lse, "sm_90")
        for launch in forward:
            launch.run()
        if variant.kernel == "forward":
            return forward
        saved = Saved(out, lse, torch.randn_like(out), new_lse(inputs.q))
        backward = triton_plan.plan_backward(inputs, saved, triton_path._empty_gradients(inputs), "sm_90")
        for launch in backward:
            launch.run()
    return [launch for launch in backward if launch.name == f"{variant.kernel}_kernel"]


def flat_inputs(leaves: list[Tensor], index: Tensor) -> FlatInputs:
    return FlatInputs(*leaves, None, index, None, SIZES.window, SIZES.chunk, 0, SIZES.head_dim**-0.5)


def median_ms(call: Callable[[], object], rep: int = 40) -> float:
    """Of single calls, the L2 cache flushed before each."""
    from triton.testing import do_bench

    return statistics.median(do_bench(call, warmup=8, rep=rep, return_mode="all"))


def run_all(of_call: list[Launch]) -> None:
    for launch in of_call:
        launch.run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_variants", description=__doc__)
    parser.add_argument("--check", type=int, help="check one variant by its number, and do nothing else")
    parser.add_argument("--cap-s", type=float, default=45.0, help="seconds that checking a variant may take")
    options = parser.parse_args()
    if options.check is not None:
        check(variants()[options.check])
        return 0
    began = time.monotonic()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    right = []
    for variant, problem in survivors(options.cap_s):
        if problem:
            print(f"LEFT OUT {variant.name}: {problem}", flush=True)
        else:
            right.append(variant)
    print(f"{len(right)} variants are right and repeat bit by bit ({time.monotonic() - began:.0f} s)", flush=True)
    best: dict[str, tuple[float, Variant]] = {}
    for variant in right:
        try:
            of_kernel = launches(variant)
            times = [median_ms(launch.run) for launch in of_kernel]
        except Exception as error:  # the others are still wanted
            print(f"FAILED {variant.name}: {error!r}"[:300], flush=True)
            continue
        flops = sum(launch.flops for launch in of_kernel)
        total = sum(times)
        print(
            f"{total:.4f} ms  {flops / total / 1e9:5.0f} TFLOP/s  {variant.name}  {[round(ms, 4) for ms in times]}",
            flush=True,
        )
        best[variant.kernel] = min(
            best.get(variant.kernel, (total, variant)), (total, variant), key=lambda pair: pair[0]
        )
    for kernel, (total, variant) in best.items():
        print(f"BEST {kernel}: {total:.4f} ms with {variant.name}")
    together(best)
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    return 0


def together(best: dict[str, tuple[float, Variant]]) -> None:
    """Whole passes with the defaults and with the best, and SDPA beside them."""
    leaves, index, docs = attention_leaves(documents=True)
    plain = flat_inputs([x.detach() for x in leaves], index)
    useful = 4 * SIZES.head_dim * triton_plan.num_pairs(plain)
    default = triton_plan.pick

    def pick(kernel: str, *args: Any) -> Config:
        return best[kernel][1].config if kernel in best else default(kernel, *args)

    for name, chosen in (("defaults", default), ("best", pick)):
        for inputs in (plain, plain._replace(doc_ids_bt=docs)):
            with mock.patch.object(triton_plan, "pick", chosen):
                out, lse = torch.empty_like(inputs.q), new_lse(inputs.q)
                forward = triton_plan.plan_forward(inputs, out, lse, "sm_90")
                saved = Saved(out, lse, torch.randn_like(out), new_lse(inputs.q))
                backward = triton_plan.plan_backward(inputs, saved, triton_path._empty_gradients(inputs), "sm_90")
            run_all(forward)
            ms, back = median_ms(lambda of=forward: run_all(of)), [(x.name, median_ms(x.run)) for x in backward]
            total = sum(of_one for _, of_one in back)
            parts = ", ".join(f"{kernel} {of_one:.3f}" for kernel, of_one in back)
            rates = f"{useful / ms / 1e9:.0f} and {2.5 * useful / total / 1e9:.0f} TFLOP/s"
            print(f"{name}, {'documents' if inputs.doc_ids_bt is not None else 'one document'}: forward {ms:.4f} ms, "
                  f"backward {total:.4f} ms, {rates} ({parts})", flush=True)  # fmt: skip
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves[:3])
    sdpa = torch.nn.functional.scaled_dot_product_attention
    flops = 4 * SIZES.head_dim * SIZES.batch * SIZES.heads * SIZES.t * (SIZES.t + 1) / 2
    out = sdpa(q, k, v, is_causal=True)
    cotangent = torch.randn_like(out)
    ms = median_ms(lambda: sdpa(q, k, v, is_causal=True))
    back_ms = median_ms(lambda: torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True))
    print(
        f"SDPA, causal: {flops / ms / 1e9:.0f} forward, {2.5 * flops / back_ms / 1e9:.0f} TFLOP/s backward", flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
