"""The C++ convolution: layouts, dtypes, threads, documents, the decoding step, errors."""

from __future__ import annotations

import pytest
import torch

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.operator import use
from tests.kernels.causal_conv1d.convolutions import run_conv
from tests.kernels.helpers import DTYPES, TOLERANCE, assert_close, assert_same_bits, documents, normal, strided

pytestmark = pytest.mark.usefixtures("nan_memory")


def test_a_width_without_a_kernel_runs_as_plain_torch():
    inputs = normal(2, 20, 5, dtype=torch.float64), normal(5, 6, dtype=torch.float64, seed=1)
    assert_close(run_conv("cpp", *inputs), run_conv("reference", *inputs), TOLERANCE)


@pytest.mark.parametrize("layout", ["parts", "every other", "reversed"])
def test_any_strides_give_the_same_bits(layout):
    conv, docs = [normal(2, 100, 37), normal(37, 4, seed=1), normal(2, 3, 37, seed=2)], documents(2, 100, 0.2)
    assert_same_bits(run_conv("cpp", *(strided(x, layout) for x in conv)), run_conv("cpp", *conv))
    got = run_conv("cpp", *(strided(x, layout) for x in conv[:2]), None, strided(docs, layout))
    assert_same_bits(got, run_conv("cpp", *conv[:2], None, docs))


def test_a_weight_of_another_dtype_is_converted_and_its_gradient_converted_back():
    x, weight = normal(2, 9, 5), normal(5, 4, seed=1).bfloat16()
    got = run_conv("cpp", x, weight)
    assert got["dweight"].dtype == torch.bfloat16
    torch.testing.assert_close(got["dx"], run_conv("cpp", x, weight.float())["dx"], rtol=0, atol=0)


@pytest.mark.parametrize("with_documents", [False, True])
def test_any_number_of_threads_gives_the_same_bits(with_documents, each_number_of_threads):
    conv = normal(2, 300, 700), normal(700, 4, seed=1), None, documents(2, 300, 0.2) if with_documents else None
    first, *others = (run_conv("cpp", *conv) for _ in each_number_of_threads)
    for other in others:
        assert_same_bits(other, first)


def test_documents_do_not_feel_each_other_to_the_last_bit():
    ids = torch.tensor([0] * 5 + [1] * 60 + [2] * 40).expand(2, -1)
    x, weight, inside = normal(2, 105, 20), normal(20, 4, seed=1), ids[0] == 1
    want = run_conv("cpp", x, weight, None, ids)
    for other in (1e4, float("inf"), float("nan")):
        changed = torch.where(inside.view(1, -1, 1), x, other * (1 + x.abs()))
        got = run_conv("cpp", changed, weight, None, ids)
        for name in ("out0", "dx"):
            assert torch.equal(got[name][:, inside], want[name][:, inside]), name
            assert not torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "width"), [(37, 2), (600, 4)])
def test_steps_continue_the_sequence(d, width, dtype):
    x, weight = normal(2, 9, d, dtype=dtype), normal(d, width, dtype=dtype, seed=1)
    state = torch.zeros(2, width - 1, d, dtype=dtype)
    with use("reference"):
        want, tail = causal_conv1d(x, weight)
    with use("cpp"):
        got = torch.stack([causal_conv1d_step(x[:, i], weight, state) for i in range(9)], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(state, tail)


def test_shapes_that_do_not_go_together_are_refused():
    x = normal(2, 8, 5)
    with use("cpp"):
        with pytest.raises(ValueError, match="5 channels, but weight_dk has 4"):
            causal_conv1d(x, normal(4, 4))
        with pytest.raises(ValueError, match="initial_btd has shape"):
            causal_conv1d(x, normal(5, 4), normal(2, 2, 5))
        with pytest.raises(ValueError, match="doc_ids_bt has shape"):
            causal_conv1d(x, normal(5, 4), None, documents(2, 7))
