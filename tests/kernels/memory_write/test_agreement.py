"""Rotations and ring writes of a decoding step, plain torch and C++: which slot, which rows, which layout."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.helpers import pairwise
from tests.kernels.memory_write.writes import (
    SETS,
    SIZES,
    TOLERANCE,
    assert_changes_only_its_slots,
    assert_defined,
    in_other_layouts,
    results,
    write_inputs,
)

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.mark.parametrize(("size", "sets", "dtype"), pairwise(SIZES, SETS, list(TOLERANCE)))
def test_plain_torch_is_the_definition(size, sets, dtype):
    assert_defined("torch", write_inputs(*size, sets, dtype))


@pytest.mark.parametrize(("size", "sets"), pairwise(SIZES, SETS))
def test_cpp_is_the_definition(size, sets):
    assert_defined("cpp", write_inputs(*size, sets))


@pytest.mark.parametrize("path", ["reference", "torch", "cpp"])
def test_only_the_slots_of_the_positions_change(path):
    assert_changes_only_its_slots(path)


@pytest.mark.parametrize("path", ["torch", "cpp"])
def test_parts_of_wider_projections_and_other_layouts_are_read_right(path):
    inputs = write_inputs(2, 2, 4, "all")
    for got, want in zip(results(path, in_other_layouts(inputs)), results(path, inputs), strict=True):
        assert torch.equal(got, want)
