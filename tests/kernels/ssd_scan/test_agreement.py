"""The plain paths of the scan against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from kernels.operator import use
from kernels.ssd_scan import ssd_scan
from tests.kernels.helpers import DTYPES, TOLERANCE, assert_close, pairwise
from tests.kernels.ssd_scan.scans import ScanSize, documents_of_all_lengths, run_scan, scan_inputs

pytestmark = pytest.mark.usefixtures("nan_memory")

SMALL = [ScanSize(1, 2, 1, 3, 3), ScanSize(63, 3, 3, 3, 4), ScanSize(64, 2, 1, 3, 4), ScanSize(150, 4, 2, 3, 5)]
SIZES = [
    *SMALL,
    ScanSize(129, 1, 1, 1, 1),
    ScanSize(70, 6, 2, 20, 35),
    ScanSize(200, 4, 2, 64, 64),
    ScanSize(100, 2, 1, 33, 128),
]
CELLS = [(path, *row) for path in ("cpp", "static") for row in pairwise(SIZES, [False, True], [False, True], DTYPES)]
CELLS += [("torch", *row) for row in pairwise(SMALL, [False, True], [False, True], DTYPES)]


@pytest.mark.parametrize(("path", "size", "with_initial", "with_documents", "dtype"), CELLS)
def test_the_scan_matches_the_reference(path, size, with_initial, with_documents, dtype):
    inputs = scan_inputs(size, with_initial=with_initial, dtype=dtype)
    docs = documents_of_all_lengths(2, size.t) if with_documents else None
    got = run_scan(path, inputs, docs)
    assert all(value.dtype == dtype for value in got.values())
    assert_close(got, run_scan("reference", inputs, docs, torch.float64), TOLERANCE)


@pytest.mark.parametrize("path", ["torch", "cpp", "static"])
@pytest.mark.parametrize("loss", [0, 1])
def test_a_loss_of_one_output_alone(loss, path):
    inputs = scan_inputs(ScanSize(70, 2, 1, 5, 6), dtype=torch.float64)
    grads = []
    for each in (path, "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with use(each):
            chosen = ssd_scan(*leaves)[loss]
        found = torch.autograd.grad(chosen, leaves, chosen.detach().cos(), allow_unused=True)
        grads.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("path", ["reference", "torch", "cpp", "static"])
def test_gradients_pass_gradcheck(path, with_documents):
    """Against finite differences: the reference's own gradients need a check that is not themselves."""
    docs = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])[None] if with_documents else None
    leaves = [x.requires_grad_() for x in scan_inputs(ScanSize(9, 2, 1, 2, 2), b=1, dtype=torch.float64)]
    with use(path):
        assert torch.autograd.gradcheck(lambda *leaves: ssd_scan(*leaves, docs), leaves)
