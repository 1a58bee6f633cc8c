"""The C++ innovation scores: threads, rows, errors."""

from __future__ import annotations

import pytest
import torch

from kernels.innovation_select import innovation_scores
from kernels.operator import use
from tests.kernels.helpers import DTYPES, normal


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_do_not_depend_on_the_number_of_threads(dtype, each_number_of_threads):
    y, weight = normal(3, 200, 131, dtype=dtype), normal(4, 131, dtype=dtype, seed=1)
    with use("cpp"):
        first, *others = (innovation_scores(y, weight) for _ in each_number_of_threads)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("width", [5, 64, 131])
def test_a_row_is_the_same_wherever_it_stands(width):
    """Odd widths also put rows at addresses of every alignment. A score reads its own row and the one before."""
    y = normal(width).repeat(70, 1)
    y[50] = float("nan")
    with use("cpp"):
        scores = innovation_scores(y[None], torch.ones(1, 1))[0, 1:]
    others = [i for i in range(69) if i not in (49, 50)]
    assert torch.equal(scores[others], scores[0].expand_as(scores[others]))


def test_a_past_of_another_length_than_the_weights_is_refused():
    """The kernel itself would read beyond the end."""
    with use("cpp"), pytest.raises((ValueError, RuntimeError)):
        innovation_scores(torch.ones(1, 2, 4), torch.ones(2, 4), torch.ones(1, 3, 4))
