"""The plain paths of the convolution against the reference in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kernels.causal_conv1d import causal_conv1d
from kernels.operator import use
from tests.kernels.causal_conv1d.convolutions import PASTS, past, run_conv
from tests.kernels.helpers import DTYPES, TOLERANCE, assert_close, normal, pairwise

pytestmark = pytest.mark.usefixtures("nan_memory")

SMALL = [(1, 5, 4), (2, 5, 4), (3, 5, 2), (40, 5, 3), (41, 5, 4)]
SIZES = [*SMALL, (65, 16, 4), (66, 17, 4), (130, 600, 4), (131, 3, 1)]
CELLS = [(path, *row) for path in ("cpp", "static") for row in pairwise(SIZES, PASTS, DTYPES)]
CELLS += [("torch", *row) for row in product(SMALL, PASTS, [torch.float64])] + [("torch", SMALL[3], "none", DTYPES[1])]


@pytest.mark.parametrize(("path", "size", "kind", "dtype"), CELLS)
def test_the_convolution_matches_the_reference(path, size, kind, dtype):
    t, d, width = size
    initial, docs = past(kind, t, d, width, dtype)
    x, weight = normal(2, t, d, dtype=dtype), normal(d, width, dtype=dtype, seed=1)
    got = run_conv(path, x, weight, initial, docs)
    want = run_conv("reference", x, weight, initial, docs, torch.float64)
    if width == 1:  # the reference's empty tail; the operator's own is the same on every fast path
        del got["out1"], want["out1"]
    assert all(value.dtype == dtype for value in got.values())
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("path", ["reference", "torch", "cpp", "static"])
def test_gradients_pass_gradcheck(path, with_documents):
    """Against finite differences: the reference's own gradients need a check that is not themselves."""
    docs = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2]).expand(2, -1) if with_documents else None
    x, weight = normal(2, 9, 3, dtype=torch.float64), normal(3, 4, dtype=torch.float64, seed=1)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    with use(path):
        assert torch.autograd.gradcheck(lambda x, w: causal_conv1d(x, w, None, docs)[0], leaves)
