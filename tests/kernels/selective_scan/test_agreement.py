"""The chunked selective scan against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.operator import use
from kernels.selective_scan import selective_scan
from tests.kernels.helpers import DTYPES, TOLERANCE, assert_close, documents, normal, pairwise, run


def inputs(b: int, t: int, d: int, n: int, with_initial: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {
        "x": normal(b, t, d, dtype=dtype),
        "dt": normal(b, t, d, dtype=dtype, seed=1).exp() * 0.1,
        "A": -normal(d, n, dtype=dtype).exp(),
        "B": normal(b, t, n, dtype=dtype, seed=2),
        "C": normal(b, t, n, dtype=dtype, seed=3),
        "D": normal(d, dtype=dtype, seed=4),
        "initial": normal(b, d, n, dtype=dtype, seed=5) if with_initial else None,
    }


@pytest.mark.parametrize(
    ("path", "t", "with_initial", "with_documents", "dtype"),
    [
        (path, *row)
        for path in ("torch", "static")
        for row in pairwise([1, 15, 16, 530], [False, True], [False, True], DTYPES)
    ],
)
def test_the_scan_matches_the_reference(path, t, with_initial, with_documents, dtype):
    given = inputs(2, t, 3, 4, with_initial, dtype)
    docs = documents(2, t) if with_documents else None
    got = run(path, lambda *leaves: selective_scan(*leaves, docs), given)
    assert all(value.dtype == dtype for value in got.values())
    assert_close(got, run("reference", lambda *leaves: selective_scan(*leaves, docs), given, torch.float64), TOLERANCE)


@pytest.mark.parametrize("path", ["reference", "torch", "static"])
def test_gradients_pass_gradcheck(path):
    """Against finite differences: the reference's own gradients need a check that is not themselves."""
    leaves = tuple(x.requires_grad_() for x in inputs(1, 9, 4, 2, True, torch.float64).values())
    with use(path):
        assert torch.autograd.gradcheck(selective_scan, leaves)
