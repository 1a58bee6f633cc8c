"""The C++ scan: layouts, dtypes, threads, documents, the decoding step, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.operator import use
from kernels.ssd_scan import ssd_scan, ssd_step
from tests.kernels.helpers import DTYPES, assert_same_bits, documents, normal, strided
from tests.kernels.ssd_scan.scans import INPUTS, ScanSize, documents_of_all_lengths, raw_step, run_scan, scan_inputs

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.mark.parametrize("layout", ["parts", "every other", "reversed"])
def test_any_strides_give_the_same_bits(layout):
    scan, docs = scan_inputs(ScanSize(100, 4, 2, 20, 35)), documents_of_all_lengths(2, 100)
    got = run_scan("cpp", [strided(x, layout) for x in scan], strided(docs, layout))
    assert_same_bits(got, run_scan("cpp", scan, docs))


def test_parts_of_one_convolution_and_an_expanded_cotangent_are_read_right():
    t, h, p, n = 90, 3, 16, 24
    packed = normal(2, t, h * p + 2 * n)
    x, B, C = packed.split([h * p, n, n], -1)
    _, dt, A, _, _, D, _ = scan_inputs(ScanSize(t, h, 1, p, n))
    views = (x.unflatten(-1, (h, p)), B.unflatten(-1, (1, n)), C.unflatten(-1, (1, n)))
    leaves = [m.detach().requires_grad_() for m in views]
    grads = []
    for path in ("cpp", "torch"):
        with use(path):
            y, _ = ssd_scan(leaves[0], dt, A, leaves[1], leaves[2], D)
        grads.append(torch.autograd.grad(y.sum(), leaves))  # the cotangent of a sum has strides of 0
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_other_dtypes_beside_x_are_converted_and_their_gradients_converted_back():
    inputs = scan_inputs(ScanSize(20, 2, 1, 3, 4))
    mixed = [inputs[0], *(x.double() for x in inputs[1:])]
    got, want = run_scan("cpp", mixed), run_scan("cpp", inputs)
    assert all(got[f"d{name}"].dtype == x.dtype for name, x in zip(INPUTS, mixed, strict=True))
    for name in got:
        assert torch.equal(got[name].float(), want[name]), name


@pytest.mark.parametrize("with_documents", [False, True])
def test_any_number_of_threads_gives_the_same_bits(with_documents, each_number_of_threads):
    scan = scan_inputs(ScanSize(300, 4, 2, 20, 24))
    docs = documents_of_all_lengths(2, 300) if with_documents else None
    first, *others = (run_scan("cpp", scan, docs) for _ in each_number_of_threads)
    for other in others:
        assert_same_bits(other, first)


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
    for name in ("out0", "dx", "ddt", "dB", "dC"):
        assert torch.equal(got[name][:, inside], want[name][:, inside]), name
        assert not torch.equal(got[name], want[name]), name
    if document == 6:
        assert torch.equal(got["out1"], want["out1"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "g", "p", "n"), [(2, 1, 3, 5), (6, 2, 16, 20), (4, 4, 1, 64), (1, 1, 150, 3)])
def test_a_step_is_the_scan_of_one_position(h, g, p, n, dtype):
    *inputs, state = scan_inputs(ScanSize(1, h, g, p, n), dtype=dtype)
    with use("reference"):
        want_y, want_state = ssd_scan(*inputs, state)
    padded = torch.cat([state, state], -1)
    for given in (state.clone(), padded[..., :n]):  # rows that lie apart
        with use("cpp"):
            y = ssd_step(*raw_step(inputs, 0), given)
        torch.testing.assert_close(y, want_y[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given, want_state, rtol=1e-5, atol=1e-5)
    assert torch.equal(padded[..., n:], state)


def wrong(inputs: list[Tensor | None], at: int, change: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    return [change(m) if i == at else m for i, m in enumerate(inputs)]


def test_shapes_that_do_not_go_together_are_refused():
    inputs = scan_inputs(ScanSize(8, 2, 1, 3, 4))
    with use("cpp"):
        for at, name in enumerate(INPUTS[1:], 1):
            if name != "B":  # whose shape the others are compared with
                with pytest.raises(ValueError, match=f"^{name} has shape"):
                    ssd_scan(*wrong(inputs, at, lambda m: m[..., :-1]))
        with pytest.raises(ValueError, match=r"^doc_ids has shape"):
            ssd_scan(*inputs, documents(2, 7))
        with pytest.raises(ValueError, match=r"^C has shape"):
            ssd_scan(*wrong(inputs, 3, lambda m: m[..., :-1]))
        with pytest.raises(ValueError, match="state has shape"):
            ssd_step(*raw_step(inputs, 0), inputs[6][:1])
