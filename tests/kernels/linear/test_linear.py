"""Projections by oneDNN against torch's own, and when each is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels.linear import cpp_path, linear, product
from kernels.operator import use
from tests.kernels.helpers import normal

TOLERANCE = 2e-6


@pytest.fixture
def products(monkeypatch):
    """Shapes of the operands of oneDNN's products."""
    seen = []
    onednn = cpp_path.onednn
    monkeypatch.setattr(cpp_path, "onednn", lambda a, b: seen.append((a.shape, b.shape)) or onednn(a, b))
    return seen


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * max(float(wanted.detach().abs().max()), 1))


@settings(max_examples=40, deadline=None)
@given(
    leading=st.sampled_from([(), (1,), (7,), (2, 5), (2, 3, 4)]),
    width=st.integers(1, 70),
    outputs=st.integers(1, 70),
    strided=st.booleans(),
)
def test_output_and_gradients_are_those_of_torch(leading, width, outputs, strided):
    x = normal(*leading, width * (1 + strided))[..., :width].detach().requires_grad_()
    weight, grad_y = normal(outputs, width, seed=1).requires_grad_(), normal(*leading, outputs, seed=2)
    assert linear.choose(x, weight).path == ("cpp" if leading else "torch")
    y, wanted = linear(x, weight), F.linear(x, weight)
    assert_close(y, wanted)
    found = torch.autograd.grad(y, (x, weight), grad_y)
    for grad, wanted_grad in zip(found, torch.autograd.grad(wanted, (x, weight), grad_y), strict=True):
        assert_close(grad, wanted_grad)


def test_a_row_is_the_same_bits_whatever_the_others_are():
    x, weight = normal(40, 24), normal(17, 24, seed=1).requires_grad_()
    changed = x.clone()
    changed[11:] = float("nan")
    assert torch.equal(linear(x, weight)[:11], linear(changed, weight)[:11])


def test_nothing_is_computed_for_an_input_without_gradient(products):
    weight = normal(3, 4).requires_grad_()
    linear(normal(5, 4), weight).sum().backward()
    assert products == [((5, 4), (3, 4))]
    assert_close(weight.grad, normal(5, 4).sum(0).expand(3, -1))


def test_it_is_for_training_in_float32_where_the_cpp_kernels_are(products):
    x, weight = normal(5, 4), normal(3, 4).requires_grad_()
    with torch.no_grad():
        linear(x, weight)
    linear(x.double(), weight.double())
    linear(x, weight.detach())
    linear(x[:0], weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with use("torch"):
        linear(x, weight)
    assert not products
    linear(x, weight)
    assert products


def test_a_wrong_width_is_named():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(normal(2, 5), normal(3, 4).requires_grad_())


def test_a_product_alone_is_that_of_torch_and_has_no_gradient(products):
    x, weight = normal(2, 5, 4), normal(3, 4, seed=1).requires_grad_()
    y = product(x, weight)
    assert products
    assert not y.requires_grad
    assert_close(y, F.linear(x, weight.detach()))
    assert_close(product(x, normal(4, 3, seed=1).t()), F.linear(x, normal(4, 3, seed=1).t()))
    assert product(x.double(), weight.double()).dtype == torch.float64
