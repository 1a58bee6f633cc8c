"""The sampling of parameters by the operators' tests."""

from __future__ import annotations

from itertools import combinations, product

from tests.kernels.helpers import pairwise


def test_every_pair_of_values_occurs_in_far_fewer_rows_than_the_product():
    axes = [range(5), "abc", [True, False], [None, 1.0]]
    rows = pairwise(*axes)
    assert len(rows) == 15
    for (i, first), (j, second) in combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(first, second))
