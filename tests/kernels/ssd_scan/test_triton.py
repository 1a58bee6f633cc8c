"""The Triton scan and its decoding step, in the interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.gpu.tuning import INTERPRETER, Config
from kernels.operator import use
from kernels.ssd_scan import ssd_scan, ssd_step, triton_path, triton_plan
from kernels.ssd_scan.reference import ScanInputs
from tests.kernels.helpers import assert_same_bits, documents, normal, pairwise
from tests.kernels.ssd_scan.scans import INPUTS, ScanSize, raw_step, run_scan, scan_inputs

pytestmark = pytest.mark.usefixtures("nan_memory")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative RMSE; see README.md


def assert_agrees(inputs: list[Tensor | None], docs: Tensor | None = None) -> None:
    got, want = run_scan("triton", inputs, docs), run_scan("reference", inputs, docs, torch.float64)
    dtypes = {f"d{name}": x.dtype for name, x in zip(INPUTS, inputs, strict=True) if x is not None}
    dtypes |= {"out0": inputs[0].dtype, "out1": torch.float32}
    for name, value in got.items():
        assert value.dtype == dtypes[name], name
        assert value.shape == want[name].shape, name
        error = (value.double() - want[name]).norm() / want[name].norm().clamp_min(1e-3)
        assert error <= TOLERANCE[inputs[0].dtype], name


@pytest.mark.parametrize(
    ("size", "with_initial", "with_documents"),
    pairwise(
        [ScanSize(1, 2, 1, 4, 8), ScanSize(16, 3, 3, 4, 8), ScanSize(33, 2, 1, 4, 8)], [False, True], [False, True]
    ),
)
def test_outputs_and_gradients_match_the_reference(size, with_initial, with_documents):
    inputs = scan_inputs(size, with_initial=with_initial)
    assert_agrees(inputs, documents(2, size.t) if with_documents else None)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("d_state", "heads"),
    [
        (8, "in turn"),
        (24, "in parallel"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, "in parallel"), (24, "in turn"))),
    ],
)
def test_several_tiles_of_channels_and_states_and_heads_of_a_group(d_state, heads, monkeypatch):
    """d_state 8 is one tile, so that B and C serve the heads that a program takes in turn; 24 is two."""
    monkeypatch.setattr(triton_plan, "MIN_PROGRAMS", 0 if heads == "in turn" else 10**6)
    assert_agrees(scan_inputs(ScanSize(21, 4, 2, 20, d_state), b=1), documents(1, 21))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("num_segments", "with_initial"),
    [
        (1, True),
        (3, True),
        (5, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (3, False), (5, True))),
    ],
)
def test_walks_over_segments(with_initial, num_segments, monkeypatch):
    """Five chunks: one walk, segments of 2, 2 and 1 chunks, and of one each."""
    config = Config({**triton_plan.FORWARD_CONFIGS[INTERPRETER][0].tiles, "WALKS": num_segments})
    for configs in (triton_plan.FORWARD_CONFIGS, triton_plan.BACKWARD_CONFIGS):
        monkeypatch.setitem(configs, INTERPRETER, (config,))
    inputs = scan_inputs(ScanSize(70, 1, 1, 4, 8), b=1, with_initial=with_initial)
    names = [launch.name for launch in triton_plan.plan_forward(ScanInputs(*inputs, None), config).launches]
    assert names.count("ssd_states_kernel") == (1 if num_segments == 1 else 2)
    assert_agrees(inputs)
    assert_agrees(inputs, torch.tensor([0] * 20 + [1] * 40 + [0] * 10)[None])  # numbers may return


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    inputs = scan_inputs(ScanSize(33, 2, 1, 16, 16), b=1, dtype=dtype, precise=torch.float32)
    assert_agrees(inputs, documents(1, 33))


def test_parts_of_one_projection_and_transposed_layouts_are_read_right():
    inputs = scan_inputs(ScanSize(18, 2, 1, 4, 8))
    packed = torch.cat([inputs[0].flatten(2), inputs[3].flatten(2), inputs[4].flatten(2)], -1)
    x, B, C = packed.split([8, 8, 8], -1)
    views = [x.unflatten(-1, (2, 4)), *inputs[1:3], B.unflatten(-1, (1, 8)), C.unflatten(-1, (1, 8)), *inputs[5:]]
    transposed = [
        None if m is None else m.transpose(0, -1).contiguous().transpose(0, -1) if m.dim() > 1 else m for m in inputs
    ]
    with use("triton"):
        want = ssd_scan(*inputs)
        for given in (views, transposed):
            for got, wanted in zip(ssd_scan(*given), want, strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.ci
def test_documents_do_not_feel_each_other_to_the_last_bit():
    docs = torch.tensor([0] * 5 + [1] * 23 + [2] * 9)[None]
    inputs = scan_inputs(ScanSize(37, 2, 1, 4, 8), b=1, with_initial=False)
    others = scan_inputs(ScanSize(37, 2, 1, 4, 8), b=1, with_initial=False)
    inside = torch.zeros(37, dtype=torch.bool)
    inside[5:28] = True
    for i in (0, 1, 3, 4):
        others[i] = torch.where(inside.view(1, -1, *[1] * (inputs[i].dim() - 2)), inputs[i], 1000 * others[i].abs())
    got, want = run_scan("triton", others, docs), run_scan("triton", inputs, docs)
    for name in ("out0", "dx", "ddt", "dB", "dC"):
        assert torch.equal(got[name][:, inside], want[name][:, inside]), name
        assert not torch.equal(got[name], want[name]), name


@pytest.mark.ci
def test_gradients_are_bitwise_the_same_every_time():
    inputs = scan_inputs(ScanSize(20, 4, 1, 4, 8), b=1)
    assert_same_bits(run_scan("triton", inputs), run_scan("triton", inputs))


def test_a_loss_of_the_final_state_alone_and_of_y_alone():
    inputs = scan_inputs(ScanSize(18, 2, 1, 4, 8))
    for index in (0, 1):
        grads = []
        for path in ("triton", "reference"):
            leaves = [m.clone().requires_grad_() for m in inputs]
            with use(path):
                ssd_scan(*leaves)[index].sum().backward()
            grads.append([torch.zeros_like(m) if m.grad is None else m.grad for m in leaves])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize("with_documents", [False, True])
def test_operators_pass_opcheck(with_documents):
    docs = documents(2, 3) if with_documents else None
    inputs = scan_inputs(ScanSize(3, 2, 1, 4, 8), with_initial=not with_documents)
    leaves = [m if m is None else m.clone().requires_grad_() for m in inputs]
    torch.library.opcheck(triton_path.scan, (*leaves, docs))
    cotangents = (normal(2, 3, 2, 4, seed=6), normal(2, 2, 4, 8, seed=7))
    torch.library.opcheck(torch.ops.bmojo.ssd_scan_backward.default, (*inputs, docs, *cotangents))


def step_inputs(dtype: torch.dtype) -> list[Tensor]:
    inputs = scan_inputs(ScanSize(1, 4, 2, 20, 24), dtype=dtype, precise=torch.float32)
    return [*raw_step(inputs, 0), inputs[6]]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_step_matches_the_reference(dtype):
    *inputs, state = step_inputs(dtype)
    wanted_state, got_state = state.double(), state.clone()
    with use("torch"):
        want = ssd_step(*(m.double() for m in inputs), wanted_state)
    with use("triton"):
        got = ssd_step(*inputs, got_state)
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
    assert (got_state.double() - wanted_state).norm() <= TOLERANCE[torch.float32] * wanted_state.norm()


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_steps_are_the_scan(path):
    *inputs, state = scan_inputs(ScanSize(5, 4, 2, 4, 8))
    with use(path):
        want, final = ssd_scan(*inputs, state)
        got = [ssd_step(*raw_step(inputs, i), state) for i in range(5)]
    torch.testing.assert_close(torch.stack(got, 1), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_a_step_reads_parts_of_one_projection():
    *inputs, state = step_inputs(torch.float32)
    wanted_state, got_state = state.clone(), state.clone()
    parts = [inputs[i].flatten(1) for i in (0, 1, 4, 5)]
    x, dt, B, C = torch.cat(parts, 1).split([part.shape[1] for part in parts], 1)
    B, C = B.unflatten(1, (2, 24)), C.unflatten(1, (2, 24))
    with use("triton"):
        want = ssd_step(*inputs, wanted_state)
        got = ssd_step(x.unflatten(1, (4, 20)), dt, *inputs[2:4], B, C, inputs[6], got_state)
    assert torch.equal(got, want)
    assert torch.equal(got_state, wanted_state)


def test_the_step_passes_opcheck():
    torch.library.opcheck(triton_path.step, tuple(step_inputs(torch.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float16 and float32, not torch.float64"),
        ({"p": 160}, "head_dim up to 128, not 160"),
        ({"n": 300}, "d_state up to 256, not 300"),
    ],
)
def test_limits_are_named(change, message):
    size = ScanSize(**{"t": 2, "h": 2, "g": 1, "p": 4, "n": 8, **{k: v for k, v in change.items() if k != "dtype"}})
    inputs = scan_inputs(size, dtype=change.get("dtype", torch.float32), precise=torch.float32)
    with use("triton"), pytest.raises(ValueError, match=message):
        ssd_scan(*inputs)


def test_heads_must_be_a_multiple_of_the_groups():
    with use("triton"), pytest.raises(ValueError, match="3 heads are not a multiple of the 2 groups"):
        ssd_scan(*scan_inputs(ScanSize(2, 3, 2, 4, 8)))


def test_a_step_refuses_a_state_it_cannot_update_in_place():
    *inputs, state = step_inputs(torch.float32)
    for invalid in (state.double(), state.transpose(0, 1).contiguous().transpose(0, 1)):
        with use("triton"), pytest.raises(ValueError, match="contiguous float32 state in place"):
            ssd_step(*inputs, invalid)
