"""The report on compiled kernels; its --check verifies facts about the code of every kernel here.

Triton compiles nothing in a process where its interpreter is on, as in these tests: subprocesses compile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_report import __main__ as command
from benchmarks.kernel_report import comparison, peers, table
from benchmarks.kernel_report.check import violations
from benchmarks.kernel_report.comparison import PeerRow
from benchmarks.kernel_report.compiled import Code, amd_registers, matrix_instructions, ptxas_registers
from benchmarks.kernel_report.occupancy import Occupancy, occupancy
from benchmarks.kernel_report.rows import Row
from benchmarks.kernel_report.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
CODE = Code(4, 128, 0, 0, 0, 0, {"wgmma.mma_async": 4}, 0)
ROW = Row(
    target="sm_90", operator="op", case="forward", kernel="kernel", constants={}, num_warps=4, num_stages=2,
    programs=64, flops=10**9, bytes=10**6, roofline_s=1e-6, code=CODE, occupancy=Occupancy(4, 16, "registers"),
)  # fmt: skip
MATRIX_PRODUCT = """
import json, sys
import torch, triton, triton.language as tl
from kernels.gpu.launch import Launch
from benchmarks.kernel_report.cases import Case
from benchmarks.kernel_report.rows import compile_cases
from benchmarks.kernel_report.table import as_json
from benchmarks.kernel_report.targets import TARGETS
from kernels.gpu.triton_math import dot

@triton.jit
def product(a, b, c, k, block: tl.constexpr):
    i = tl.arange(0, block)
    total = tl.zeros((block, block), tl.float32)
    for first in range(0, k, block):
        a_tile = tl.load(a + i[:, None] * k + first + i[None, :])
        b_tile = tl.load(b + (first + i[:, None]) * block + i[None, :])
        total = dot(a_tile, b_tile, total)
    tl.store(c + i[:, None] * block + i[None, :], total.to(c.dtype.element_ty))

def launch(block, dtype):
    shapes = {"a": (block, 1024), "b": (1024, block), "c": (block, block)}
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return Launch(product, (1,), {**tensors, "k": 1024}, {"block": block}, flops=2 * 1024 * block**2)

fits, does_not = launch(64, torch.bfloat16), launch(64, torch.bfloat16)
does_not.args["k"] = "no number"
cases = [Case("test", "three", (fits, launch(64, torch.float32), does_not))]
rows = [row for target in TARGETS.values() for row in compile_cases(cases, target, lambda line: None)]
print(as_json(rows, {}))
"""


AUTOTUNED = """
import torch, triton, triton.language as tl
from benchmarks.kernel_report.recorder import pretended, recorded
from benchmarks.kernel_report.targets import TARGETS

@triton.autotune([triton.Config({"block": b}, num_warps=w) for b in (64, 128) for w in (2, 4)], key=["n"])
@triton.heuristics({"even": lambda args: args["n"] % args["block"] == 0})
@triton.jit
def copy(a, b, n, block: tl.constexpr, even: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(b + i, tl.load(a + i, mask=i < n), mask=i < n)

target = TARGETS["gfx942"]
a, b = torch.empty(192, device="meta"), torch.empty(192, device="meta")
with pretended(target), recorded(target) as calls:
    assert triton.runtime.driver.active.get_current_target().arch == "gfx942"
    assert torch.cuda.get_device_name(0) == "MI300X"
    copy[lambda meta: (triton.cdiv(192, meta["block"]),)](a, b, 192)
    copy.fn.fn[(3,)](a, b=b, n=192, block=64, even=True, num_warps=1, num_stages=5)
tuned, plain = calls
assert [(x.grid, x.constants["block"], x.constants["even"], x.num_warps, x.num_stages) for x in tuned] == [
    ((3,), 64, True, 2, 3), ((3,), 64, True, 4, 3), ((2,), 128, False, 2, 3), ((2,), 128, False, 4, 3)]
assert (plain[0].grid, plain[0].num_warps, plain[0].num_stages, plain[0].bytes) == ((3,), 1, 5, 2 * 192 * 4)
assert set(plain[0].args) == {"a", "b", "n"}
assert "amdgcn" in tuned[2].compile(target.triton_target()).asm
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    outside["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=outside, capture_output=True, text=True)


def report(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "benchmarks.kernel_report", *arguments, **environment)


@pytest.mark.ci
def test_the_kernels_of_an_operator_compile_for_sm_90_without_spills_and_on_tensor_cores():
    done = report("--check", "--arch", "sm_90", "--operator", "ssd_scan")
    assert done.returncode == 0, done.stderr
    assert "facts violated: 0." in done.stderr


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_within_its_shared_memory():
    done = report("--check")
    assert done.returncode == 0, done.stderr


def test_a_matrix_product_is_compiled_for_every_target(tmp_path):
    script = tmp_path / "product.py"
    script.write_text(MATRIX_PRODUCT)
    done = run(str(script))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    bf16, float32, failed = rows[0::3], rows[1::3], rows[2::3]
    instructions = [next(iter(row["code"]["matrix_instructions"])) for row in bf16]
    assert instructions == ["mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma"]
    for row in bf16:
        assert row["code"]["registers"] > 0
        assert row["code"]["shared_bytes"] >= 2 * 64 * 64 * 2
        assert row["code"]["scalar_products"] == 0
        assert row["occupancy"]["blocks"] >= 1
    assert [row["code"]["scalar_products"] for row in float32] == [1, 1, 1, 0]  # AMD multiplies float32 matrices too
    assert bf16[2]["code"]["tensor_memory_columns"] == 64
    assert all(row["code"] is None and row["error"] for row in failed)


def test_another_librarys_launches_are_recorded_in_every_configuration(tmp_path):
    script = tmp_path / "autotuned.py"
    script.write_text(AUTOTUNED)
    done = run(str(script))
    assert done.returncode == 0, done.stderr


def test_the_comparison_marks_where_ours_takes_more():
    def row(library: str, tried: int) -> PeerRow:
        return PeerRow(
            "sm_90", "op", library, "forward", "kernel", tried, 1, (64, 255), (0, 2048), {}, 4, 2, 10**6, CODE
        )

    worse = dataclasses.replace(row("ours", 1), code=dataclasses.replace(CODE, registers=200))
    page = comparison.as_markdown([worse, row("fla", 4), row("fla", 4)], {"date": "2026-01-02", "fla-core": "0.6"})
    assert "| sm_90 | op | forward | 1 / 2 | 1 / 2 | **200 / 128** | 0 / 0 | 0.0 / 0.0 |" in page
    assert "| fla | `kernel` | 4 (1) | 4 x 2 | 128 (64 .. 255) | 0 | 0.0 (0.0 .. 2.0) | 4 (16) |" in page
    assert comparison.from_json(json.loads(json.dumps(dataclasses.asdict(worse)))) == worse


def test_ours_beside_a_windows_peer_is_the_window_alone():
    forward, backward = list(peers.window_only("sm_90"))[:2]
    assert (forward.name, backward.name) == ("forward, head_dim 64, window only", "backward, head_dim 64, window only")
    assert [launch.name for launch in (*forward.launches, *backward.launches)] == [
        "forward_kernel", "query_grad_kernel", "key_grad_kernel",
    ]  # fmt: skip


def test_occupancy_is_what_the_vendors_formulas_give():
    def fit(target: str, **code: int) -> tuple[int, int, str]:
        return dataclasses.astuple(occupancy(dataclasses.replace(CODE, **code), TARGETS[target]))

    assert fit("sm_90", registers=168, num_warps=8) == (1, 8, "registers")  # 3 warps in each partition
    assert fit("sm_90", registers=32, shared_bytes=112 * 1024) == (2, 8, "shared memory")  # 113 KiB with the reserve
    assert fit("sm_90", registers=32, shared_bytes=114 * 1024) == (1, 4, "shared memory")
    assert fit("sm_80", registers=16, num_warps=1) == (32, 32, "blocks")
    assert fit("sm_80", registers=32, num_warps=8) == (8, 64, "warps")
    assert fit("sm_80", registers=40, num_warps=8) == (6, 48, "registers")
    assert fit("sm_100", registers=32, tensor_memory_columns=256) == (2, 8, "tensor memory")
    assert fit("sm_90", shared_bytes=228 * 1024)[0] == 0
    assert fit("gfx942", registers=96) == (5, 20, "registers")  # LLVM says the same of 96: occupancy 5
    assert fit("gfx942", registers=512, num_warps=8) == (0, 0, "registers")
    assert fit("gfx942", registers=64, num_warps=1) == (32, 32, "warps")
    assert fit("gfx942", registers=64, shared_bytes=33 * 1024) == (1, 4, "shared memory")


def test_roofline_is_the_longer_of_products_and_traffic():
    assert TARGETS["sm_80"].roofline_s(312 * 10**12, 1) == 1
    assert TARGETS["gfx942"].roofline_s(1, 53 * 10**11) == 1


def test_what_compilers_print_is_read():
    log = "    592 bytes stack frame, 736 bytes spill stores, 748 bytes spill loads\nptxas info    : Used 255 registers"
    assert ptxas_registers(log) == (255, 748, 592)
    with pytest.raises(ValueError, match="another version of it"):
        ptxas_registers("")
    metadata = (
        "  - .agpr_count: 33\n    .private_segment_fixed_size: 24\n    .vgpr_count: 289\n    .vgpr_spill_count: 5\n"
    )
    assert amd_registers(metadata) == (289, 20, 24)
    with pytest.raises(ValueError, match=r"has no \.vgpr_count"):
        amd_registers("")
    ptx = "\t@%p1 tcgen05.mma.cta_group::1 [%r1];\n\tmma.sync.aligned.m16n8k16;\n\tmma.sync.aligned;\n// mma.sync"
    assert matrix_instructions(ptx, "cuda") == {"tcgen05.mma": 1, "mma.sync": 2}


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ({"spilled_bytes": 8}, "8 bytes per thread are spilled from 128 registers"),
        ({"matrix_instructions": {}}, "claims 1,000,000,000 FLOPs but has no matrix instruction"),
        ({"scalar_products": 2}, "2 matrix products run on scalar units"),
        ({"shared_bytes": 228 * 1024}, "233,472 bytes of shared memory; a block of sm_90 can have 232,448"),
    ],
)
def test_check_tells_of_each_violated_fact(code, problem):
    assert violations([ROW]) == []
    wrong = dataclasses.replace(ROW, code=dataclasses.replace(CODE, **code))
    (found,) = violations([ROW, wrong, wrong])
    assert found.startswith("sm_90 op: forward: kernel: ")
    assert problem in found


def test_check_tells_of_a_kernel_that_does_not_compile():
    (found,) = violations([dataclasses.replace(ROW, code=None, occupancy=None, error="CompilationError: why")])
    assert "does not compile" in found
    assert "why" in found


def test_the_page_has_a_line_a_kernel_and_case_and_names_its_sources():
    failed = dataclasses.replace(ROW, kernel="broken", code=None, occupancy=None, error="E: a|b\nmore")
    page = table.as_markdown([ROW, failed], {"date": "2026-01-02", "torch": "2"})
    assert "# Kernels, compiled ahead of time (2026-01-02)" in page
    assert (
        "| forward | `kernel` | 4 x 2 | 128 | 0 | 0.0 | 4 (16) | registers | 4 wgmma.mma_async | 64 | 1.0 | 1.0 |"
        in page
    )
    assert "| forward | `broken` | 4 x 2 | does not compile: E: a\\|b |" in page
    assert "| forward | *all 2 launches* | | | | | | | | | 2.0 | 2.0 | 1000 | 2.0 |" in page
    for target in TARGETS.values():
        assert target.peaks_source in page
    assert json.loads(table.as_json([ROW], {}))["rows"][0]["code"]["registers"] == 128


def test_the_command_refuses_what_cannot_work(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--check"]) == 2
    assert "Unset it: env -u TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    assert command.main(["--peers", "--check"]) == 2
    assert "leave out --check" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(["--peers"]) == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--arch", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err
