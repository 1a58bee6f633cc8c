"""The C++ kernels of the SSD scan and the causal convolution, against the references in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.ssd_scan import ssd_scan, ssd_step

pytestmark = pytest.mark.usefixtures("nan_memory")

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative to the largest value; see each README.md
DTYPES = list(TOLERANCE)
SCAN_INPUTS = ("x", "dt", "A", "B", "C", "D", "initial")


class ScanSize(NamedTuple):
    t: int
    h: int
    g: int
    p: int
    n: int


SCAN_SIZES = [
    ScanSize(1, 2, 1, 3, 3), ScanSize(63, 3, 3, 3, 4), ScanSize(64, 2, 1, 3, 4), ScanSize(150, 4, 2, 3, 5),
    ScanSize(129, 1, 1, 1, 1), ScanSize(70, 6, 2, 20, 35), ScanSize(200, 4, 2, 64, 64), ScanSize(100, 2, 1, 33, 128),
]  # fmt: skip
CONV_SIZES = [(1, 5, 4), (2, 5, 4), (3, 5, 2), (40, 5, 3), (65, 16, 4), (66, 17, 4), (130, 600, 4), (131, 3, 1)]


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def documents(batch: int, t: int) -> Tensor:
    """Short ones, some of one position, and in the second half a long one."""
    starts = torch.rand(batch, t, generator=torch.Generator().manual_seed(t)) < 0.2
    starts[:, t // 2 :] &= torch.rand(batch, t - t // 2, generator=torch.Generator().manual_seed(1)) < 0.05
    return starts.cumsum(1)


def scan_inputs(
    size: ScanSize, *, with_initial: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    t, h, g, p, n = size
    return [
        normal(2, t, h, p, dtype=dtype),
        normal(2, t, h, dtype=dtype, seed=1).exp() * 0.1,
        -normal(h, dtype=dtype).exp(),
        normal(2, t, g, n, dtype=dtype, seed=2),
        normal(2, t, g, n, dtype=dtype, seed=3),
        normal(h, dtype=dtype, seed=4),
        normal(2, h, p, n, dtype=dtype, seed=5) if with_initial else None,
    ]


def run_scan(path: str, inputs: list[Tensor | None], docs: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and the gradient of every input."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with dispatch.use(path):
        y, final = ssd_scan(*leaves, docs)
    cotangents = [normal(*y.shape, dtype=y.dtype, seed=8), normal(*final.shape, dtype=y.dtype, seed=9)]
    given = {f"d{name}": x for name, x in zip(SCAN_INPUTS, leaves, strict=True) if x is not None}
    grads = torch.autograd.grad([y, final], list(given.values()), cotangents)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(given, grads, strict=True))}


def run_conv(
    path: str, x: Tensor, weight: Tensor, initial: Tensor | None = None, docs: Tensor | None = None
) -> dict[str, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with dispatch.use(path):
        y, tail = causal_conv1d(x, weight, initial, docs)
    dx, dweight = torch.autograd.grad(y, (x, weight), normal(*y.shape, dtype=y.dtype, seed=8))
    return {"y": y.detach(), "tail": tail, "dx": dx, "dweight": dweight}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == dtype, name
        assert value.shape == want[name].shape, name
        error = (value.double() - want[name].double()).abs().max()
        assert error <= TOLERANCE[dtype] * max(1.0, want[name].abs().max().item()), name


def assert_scan_agrees(inputs: list[Tensor | None], docs: Tensor | None = None) -> None:
    precise = [None if x is None else x.double() for x in inputs]
    assert_close(run_scan("cpp", inputs, docs), run_scan("reference", precise, docs), inputs[0].dtype)


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("size", SCAN_SIZES)
def test_the_scan_matches_the_reference(size, with_initial, with_documents, dtype):
    inputs = scan_inputs(size, with_initial=with_initial, dtype=dtype)
    assert_scan_agrees(inputs, documents(2, size.t) if with_documents else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past", ["none", "documents", "initial"])
@pytest.mark.parametrize(("t", "d", "width"), CONV_SIZES)
def test_the_convolution_matches_the_reference(t, d, width, past, dtype):
    initial = normal(2, width - 1, d, dtype=dtype, seed=2) if past == "initial" and width > 1 else None
    x, weight = normal(2, t, d, dtype=dtype), normal(d, width, dtype=dtype, seed=1)
    got, want = (run_conv(path, x, weight, initial, documents(2, t) if past == "documents" else None)
                 for path in ("cpp", "reference"))  # fmt: skip
    if width == 1:  # the reference's empty tail; the operator's own is the same on every fast path
        del got["tail"], want["tail"]
    assert_close(got, want, dtype)


def test_a_width_without_a_kernel_runs_as_plain_torch():
    inputs = normal(2, 20, 5, dtype=torch.float64), normal(5, 6, dtype=torch.float64, seed=1)
    assert_close(run_conv("cpp", *inputs), run_conv("reference", *inputs), torch.float64)


def strided(inputs: list[Tensor | None], layout: str) -> list[Tensor | None]:
    """The same numbers as parts of wider rows, as every other element, or with the axes in reverse order."""
    if layout == "parts":
        widened = [None if m is None else torch.cat([m, m, m], -1) for m in inputs]
        return [None if w is None else w.split(m.shape[-1], -1)[1] for w, m in zip(widened, inputs, strict=True)]
    if layout == "every other":
        return [None if m is None else torch.stack([m, m + 1], -1)[..., 0] for m in inputs]
    return [None if m is None else m.permute(*range(m.dim())[::-1]).contiguous().permute(*range(m.dim())[::-1])
            for m in inputs]  # fmt: skip


@pytest.mark.parametrize("layout", ["parts", "every other", "reversed"])
def test_any_strides_give_the_same_bits(layout):
    scan, docs = scan_inputs(ScanSize(100, 4, 2, 20, 35)), documents(2, 100)
    assert_same_bits(run_scan("cpp", strided(scan, layout), strided([docs], layout)[0]), run_scan("cpp", scan, docs))
    conv = [normal(2, 100, 37), normal(37, 4, seed=1), normal(2, 3, 37, seed=2)]
    assert_same_bits(run_conv("cpp", *strided(conv, layout)), run_conv("cpp", *conv))
    got = run_conv("cpp", *strided(conv[:2], layout), None, strided([docs], layout)[0])
    assert_same_bits(got, run_conv("cpp", *conv[:2], None, docs))


def test_parts_of_one_convolution_and_an_expanded_cotangent_are_read_right():
    t, h, p, n = 90, 3, 16, 24
    packed = normal(2, t, h * p + 2 * n)
    x, B, C = packed.split([h * p, n, n], -1)
    _, dt, A, _, _, D, _ = scan_inputs(ScanSize(t, h, 1, p, n))
    views = (x.unflatten(-1, (h, p)), B.unflatten(-1, (1, n)), C.unflatten(-1, (1, n)))
    leaves = [m.detach().requires_grad_() for m in views]
    grads = []
    for path in ("cpp", "torch"):
        with dispatch.use(path):
            y, _ = ssd_scan(leaves[0], dt, A, leaves[1], leaves[2], D)
        grads.append(torch.autograd.grad(y.sum(), leaves))  # the cotangent of a sum has strides of 0
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("loss", ["y", "final"])
def test_a_loss_of_one_output_alone(loss):
    inputs = scan_inputs(ScanSize(70, 2, 1, 5, 6), dtype=torch.float64)
    grads = []
    for path in ("cpp", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with dispatch.use(path):
            y, final = ssd_scan(*leaves)
        chosen = {"y": y, "final": final}[loss]
        found = torch.autograd.grad(chosen, leaves, normal(*chosen.shape, dtype=torch.float64), allow_unused=True)
        grads.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_other_dtypes_beside_x_are_converted_and_their_gradients_converted_back():
    inputs = scan_inputs(ScanSize(20, 2, 1, 3, 4))
    mixed = [inputs[0], *(x.double() for x in inputs[1:])]
    got, want = run_scan("cpp", mixed), run_scan("cpp", inputs)
    assert all(got[f"d{name}"].dtype == x.dtype for name, x in zip(SCAN_INPUTS, mixed, strict=True))
    for name in got:
        assert torch.equal(got[name].float(), want[name]), name
    x, weight = normal(2, 9, 5), normal(5, 4, seed=1).bfloat16()
    got = run_conv("cpp", x, weight)
    assert got["dweight"].dtype == torch.bfloat16
    torch.testing.assert_close(got["dx"], run_conv("cpp", x, weight.float())["dx"], rtol=0, atol=0)


def test_gradients_pass_gradcheck():
    inputs = scan_inputs(ScanSize(9, 4, 2, 2, 3), dtype=torch.float64)
    docs = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2]).expand(2, -1)
    x, weight = normal(2, 9, 3, dtype=torch.float64), normal(3, 4, dtype=torch.float64, seed=1)
    with dispatch.use("cpp"):
        for doc_ids in (None, docs):
            leaves = [m.detach().requires_grad_() for m in inputs]
            assert torch.autograd.gradcheck(lambda *m, doc_ids=doc_ids: ssd_scan(*m, doc_ids), leaves)
            assert torch.autograd.gradcheck(
                lambda x, w, doc_ids=doc_ids: causal_conv1d(x, w, None, doc_ids)[0],
                (x.requires_grad_(), weight.requires_grad_()),
            )


@pytest.mark.parametrize("with_documents", [False, True])
def test_any_number_of_threads_gives_the_same_bits(with_documents, keep_threads):
    scan, docs = scan_inputs(ScanSize(300, 4, 2, 20, 24)), documents(2, 300) if with_documents else None
    conv = normal(2, 300, 700), normal(700, 4, seed=1), None, docs
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((run_scan("cpp", scan, docs), run_conv("cpp", *conv)))
    for of_scan, of_conv in results[1:]:
        assert_same_bits(of_scan, results[0][0])
        assert_same_bits(of_conv, results[0][1])


# Boundaries inside a chunk, on a chunk's edge, documents over several chunks, and numbers that return.
BOUNDARIES = (0, 10, 11, 64, 100, 230, 256, 300)


@pytest.mark.parametrize("other", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("document", range(7))
def test_documents_do_not_feel_each_other_to_the_last_bit(document, other):
    lengths = torch.tensor(BOUNDARIES).diff()
    docs = (torch.arange(7) % 3).repeat_interleave(lengths).expand(2, -1)
    inside = torch.zeros(300, dtype=torch.bool)
    inside[BOUNDARIES[document] : BOUNDARIES[document + 1]] = True

    def elsewhere(m: Tensor) -> Tensor:
        return torch.where(inside.view(1, -1, *[1] * (m.dim() - 2)), m, other * (1 + m.abs()))

    scan = scan_inputs(ScanSize(300, 4, 2, 20, 24), with_initial=False)
    changed = [elsewhere(m) if i in (0, 1, 3, 4) else m for i, m in enumerate(scan)]
    got, want = run_scan("cpp", changed, docs), run_scan("cpp", scan, docs)
    for name in ("y", "dx", "ddt", "dB", "dC"):
        assert torch.equal(got[name][:, inside], want[name][:, inside]), name
        assert not torch.equal(got[name], want[name]), name
    if document == 6:
        assert torch.equal(got["final"], want["final"])


def test_convolution_documents_do_not_feel_each_other_to_the_last_bit():
    ids = torch.tensor([0] * 5 + [1] * 60 + [2] * 40).expand(2, -1)
    x, weight, inside = normal(2, 105, 20), normal(20, 4, seed=1), ids[0] == 1
    want = run_conv("cpp", x, weight, None, ids)
    for other in (1e4, float("inf"), float("nan")):
        changed = torch.where(inside.view(1, -1, 1), x, other * (1 + x.abs()))
        got = run_conv("cpp", changed, weight, None, ids)
        for name in ("y", "dx"):
            assert torch.equal(got[name][:, inside], want[name][:, inside]), name
            assert not torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "g", "p", "n"), [(2, 1, 3, 5), (6, 2, 16, 20), (4, 4, 1, 64), (1, 1, 150, 3)])
def test_a_step_is_the_scan_of_one_position(h, g, p, n, dtype):
    x, dt, A, B, C, D, state = scan_inputs(ScanSize(1, h, g, p, n), dtype=dtype)
    with dispatch.use("reference"):
        want_y, want_state = ssd_scan(x, dt, A, B, C, D, state)
    padded = torch.cat([state, state], -1)
    for given in (state.clone(), padded[..., :n]):  # rows that lie apart
        with dispatch.use("cpp"):
            y = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, given)
        torch.testing.assert_close(y, want_y[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given, want_state, rtol=1e-5, atol=1e-5)
    assert torch.equal(padded[..., n:], state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "width"), [(37, 2), (600, 4)])
def test_steps_of_the_convolution_continue_it(d, width, dtype):
    x, weight = normal(2, 9, d, dtype=dtype), normal(d, width, dtype=dtype, seed=1)
    state = torch.zeros(2, width - 1, d, dtype=dtype)
    with dispatch.use("reference"):
        want, tail = causal_conv1d(x, weight)
    with dispatch.use("cpp"):
        got = torch.stack([causal_conv1d_step(x[:, i], weight, state) for i in range(9)], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(state, tail)


def wrong(inputs: list[Tensor | None], at: int, change: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    return [change(m) if i == at else m for i, m in enumerate(inputs)]


def test_shapes_that_do_not_go_together_are_refused():
    inputs = scan_inputs(ScanSize(8, 2, 1, 3, 4))
    with dispatch.use("cpp"):
        for at, name in enumerate(SCAN_INPUTS[1:], 1):
            if name != "B":  # whose shape the others are compared with
                with pytest.raises(ValueError, match=f"^{name} has shape"):
                    ssd_scan(*wrong(inputs, at, lambda m: m[..., :-1]))
        with pytest.raises(ValueError, match=r"^doc_ids has shape"):
            ssd_scan(*inputs, documents(2, 7))
        with pytest.raises(ValueError, match=r"^C has shape"):
            ssd_scan(*wrong(inputs, 3, lambda m: m[..., :-1]))
        x = normal(2, 8, 5)
        with pytest.raises(ValueError, match="5 channels, but weight_dk has 4"):
            causal_conv1d(x, normal(4, 4))
        with pytest.raises(ValueError, match="initial_btd has shape"):
            causal_conv1d(x, normal(5, 4), normal(2, 2, 5))
        with pytest.raises(ValueError, match="doc_ids_bt has shape"):
            causal_conv1d(x, normal(5, 4), None, documents(2, 7))
        with pytest.raises(ValueError, match="state has shape"):
            ssd_step(*(m[:, 0] if m.dim() > 1 else m for m in inputs[:6]), inputs[6][:1])
