"""Rotations and ring writes of a decoding step in Triton, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels.memory_write import Rings, memory_write, reference, triton_path
from kernels.operator import use
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
def test_triton_is_the_definition(size, sets, dtype):
    assert_defined("triton", write_inputs(*size, sets, dtype))


def test_only_the_slots_of_the_positions_change():
    assert_changes_only_its_slots("triton")


def test_parts_of_wider_projections_and_other_layouts_are_read_right():
    inputs = write_inputs(2, 2, 4, "all")
    for got, want in zip(results("triton", in_other_layouts(inputs)), results("triton", inputs), strict=True):
        assert torch.equal(got, want)


def test_rings_of_another_dtype_hold_rounded_rows():
    inputs = write_inputs(2, 2, 4, "all")
    rings = Rings(*(None if ring is None else ring.bfloat16() for ring in inputs.rings))
    got, want = (results(path, inputs._replace(rings=rings)) for path in ("triton", "torch"))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


def test_the_launch_passes_opcheck():
    torch.library.opcheck(triton_path.write, tuple(triton_path.FlatWrite.of(reference.example())))


def test_limits_are_named():
    inputs = write_inputs(2, 2, 4, "all")
    with use("triton"), pytest.raises(ValueError, match=r"float16 and float32, not torch\.float64"):
        memory_write(*inputs._replace(q_bhp=inputs.q_bhp.double()))
    rings = inputs.rings._replace(window_v=inputs.rings.window_v.transpose(2, 3).contiguous().transpose(2, 3))
    with use("triton"), pytest.raises(ValueError, match="channels of each head must lie side by side"):
        memory_write(*inputs._replace(rings=rings))
