"""The block's small operators in Triton against their formulas in float64; in 16 bits too, and with dtypes that differ.

In the interpreter; with TRITON_INTERPRET=0 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.again import making_again
from kernels.operator import use
from kernels.pointwise import (
    add_rms_norm,
    branch,
    cross_entropy_,
    gated,
    gated_product,
    gated_rms_norm,
    rms_norm,
    rotary_table,
    rotate,
    rotate_both,
    rotate_keys,
    split,
)
from kernels.pointwise.triton_path import TOLERANCE, join
from tests.kernels.helpers import assert_close, normal, pairwise, run

pytestmark = pytest.mark.usefixtures("nan_memory")

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 3), (7, 5), (2, 37, 100), (3, 2, 5, 33), (1, 1), (70, 257)]
LIMITS = TOLERANCE | {torch.float32: 3e-5}  # a weight's gradient sums over all rows

Call = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_exact(call: Call, inputs: list[Tensor]) -> None:
    """As plain torch in float64 of the same numbers, which tests/kernels/pointwise/test_pointwise.py checks."""
    named = {str(i): x for i, x in enumerate(inputs)}
    got = run("triton", call, named)
    want = run("torch", call, named, torch.float64)
    assert_close(got, want, LIMITS)
    for i, x in enumerate(inputs):
        grad = got[f"d{i}"]
        assert grad is None or grad.dtype == x.dtype


@pytest.mark.parametrize(("shape", "dtype"), pairwise(SHAPES, DTYPES))
def test_norms_and_gates(shape, dtype):
    x, gate, weight = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([shape, shape, shape[-1:]]))
    assert_exact(lambda x, weight: rms_norm(x, weight, EPS), [x, weight])
    assert_exact(lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS), [x, 2 * gate, weight])
    assert_exact(gated, [x, 4 * gate])
    assert_exact(gated_product, [torch.cat([3 * gate, x], -1)])


@pytest.mark.parametrize(("shape", "used"), pairwise(SHAPES, [[0, 1], [0], [1]]))
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16, torch.float32)]
)
def test_a_step_along_the_stream_mixes_dtypes(shape, used, dtypes):
    x, delta, weight = (normal(*s, dtype=d) for s, d in zip([shape, shape, shape[-1:]], dtypes, strict=True))
    result = torch.bfloat16

    def call(delta: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:  # cotangents are in the first one's dtype
        both = add_rms_norm(x, delta, weight, EPS, result if x.dtype != torch.float64 else None)
        return tuple(both[i] for i in used)

    assert_exact(call, [delta, x, weight])
    with use("triton"):
        total, normed = add_rms_norm(x, delta, weight, EPS, result)
    assert total.dtype == dtypes[0]
    assert normed.dtype == result


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    wide = normal(2, 6, 40, dtype=dtype)
    x, gate, weight = wide[..., 3:16], wide[:, :, 20:33], normal(13, 2, dtype=dtype, seed=1)[:, 0]
    heads_first = normal(2, 13, 6, dtype=dtype, seed=2).transpose(1, 2)
    for inner in (x, x.transpose(0, 1).contiguous().transpose(0, 1), heads_first):
        assert_exact(lambda x, weight: rms_norm(x, weight, EPS), [inner, weight])
        assert_exact(lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS), [inner, gate, weight])
        assert_exact(gated, [inner, gate])
        assert_exact(gated_product, [inner[..., :12]])


@pytest.mark.ci
@pytest.mark.parametrize(
    ("shapes", "inverse", "dtype"),
    pairwise(
        [
            ((2, 9, 3, 8), (9,)), ((2, 9, 3, 8), (2, 9)), ((2, 9, 3, 8), ()), ((2, 9, 1, 6), (1, 9)),
            ((4, 3, 2), (4,)), ((4, 3, 10), ()), ((3, 70, 5, 64), (70,)), ((1, 1, 1, 2), (1,)),
        ],
        [False, True],
        DTYPES,
    ),
)  # fmt: skip
def test_rotations(shapes, inverse, dtype):
    shape, table = shapes
    angle, other = normal(*table, shape[-1] // 2, seed=1), normal(shape[-1] // 2, seed=2)
    tables, far = (angle.cos(), angle.sin()), (other.cos(), other.sin())
    strided = normal(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 1 : 1 + shape[-1]]
    turned = normal(shape[-2], *shape[:-2], shape[-1], dtype=dtype).movedim(0, -2)
    for x in (strided, turned):
        assert_exact(lambda x: rotate(x, *tables, inverse), [x])
        assert_exact(lambda x: rotate_both(x, tables, far), [x])
        assert_exact(lambda x: rotate_both(x, tables, far)[1], [x])
        assert_exact(lambda x: tuple(rotate_keys(torch.cat([x, x], -2), *tables)), [x])
        for used in (0, 1, 2):
            assert_exact(lambda x, used=used: rotate_keys(torch.cat([x, x], -2), *tables)[used], [x])


@pytest.mark.parametrize("shape", [(1,), (33,), (2, 700)])
@pytest.mark.parametrize(("head_dim", "dtype"), [(2, torch.float32), (64, torch.bfloat16), (96, torch.float32)])
def test_rotary_tables(shape, head_dim, dtype):
    """Of near and far positions, and of more than a program writes."""
    position = torch.randint(0, 2**20, shape)
    tables = {}
    for path in ("triton", "reference"):
        with use(path):
            tables[path] = rotary_table(position, head_dim, 1e4, dtype)
    for got, want in zip(tables["triton"], tables["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("num_rows", "used", "dtype"),
    pairwise([(9, 9, 6), (1, 9, 4), (5, 5, 5), (9, 0, 2)], [[0, 1, 2], [0, 2], [1, 2], [2], [0, 1]], DTYPES),
)
def test_branch(num_rows, used, dtype):
    for x in (normal(3, 9, 5, dtype=dtype), normal(9, 3, 40, dtype=dtype).transpose(0, 1)):
        assert_exact(lambda x: tuple(branch(x, num_rows)[i] for i in used), [x])


@pytest.mark.parametrize(
    ("shape", "used", "dtype"), pairwise([(2, 5, 12), (70, 12), (12,)], [[0, 1, 2], [0, 2], [1], [2]], DTYPES)
)
def test_split(shape, used, dtype):
    assert_exact(lambda x: tuple(split(x, (5, 6, 1))[i] for i in used), [normal(*shape, dtype=dtype)])


def test_joined_rows_are_filled_up_with_zeros():
    wide = torch.full((4, 9), float("nan"))  # what lies beside a part in memory
    wide[:, :6] = normal(4, 6)
    joined = torch.full((4, 16), float("nan"))
    join((wide[:, :3], None, wide[:, 3:6]), joined, (3, 5, 3))
    zeros = torch.zeros(4, 5)
    assert torch.equal(joined, torch.cat([wide[:, :3], zeros, wide[:, 3:6], zeros], 1))


@pytest.mark.parametrize(("width", "z_loss_weight", "dtype"), pairwise([1, 11, 300, 9000], [0.0, 0.1], DTYPES))
def test_cross_entropy(width, z_loss_weight, dtype):
    logits = 3 * normal(5, width + 1, dtype=dtype)[:, :width]
    target = torch.arange(5) * 7 % width
    exact, results = logits.double(), logits.clone()
    with use("torch"):
        want = cross_entropy_(exact, target, z_loss_weight)
    with use("triton"):
        got = cross_entropy_(results, target, z_loss_weight)
        without = cross_entropy_(logits.clone(), target, z_loss_weight, with_gradient=False)
    named = {"nll": got.nll_s, "log_z": got.log_z_s, "logits": results}
    assert_close(named, {"nll": want.nll_s, "log_z": want.log_z_s, "logits": exact}, LIMITS)
    assert torch.equal(without.nll_s, got.nll_s)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_give_no_nan(dtype):
    gate = torch.tensor([-1e4, -200.0, -88.5, -87.0, 0.0, 87.0, 88.5, 200.0, 1e4], dtype=dtype).repeat(2, 1)
    x, weight = normal(2, 9, dtype=dtype), normal(9, dtype=dtype, seed=1)
    assert_exact(gated, [x, gate])
    closed = torch.full_like(gate, -1e4)
    for given in (gate, closed):
        named = {"x": x, "gate": given, "weight": weight}
        results = run("triton", lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS), named)
        assert all(value is not None and value.isfinite().all() for value in results.values())


def test_no_rows():
    x, weight = torch.zeros(0, 4), torch.ones(4)
    for value in run("triton", lambda x, weight: rms_norm(x, weight, EPS), {"x": x, "weight": weight}).values():
        assert value is not None
        assert value.shape == x.shape or not value.any()
    with use("triton"):
        assert gated_product(x).shape == (0, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rms_norm(x, torch.ones(3), EPS),
        lambda x: add_rms_norm(x, x[:1], torch.ones(4), EPS),
        lambda x: gated(x, x[:1]),
        lambda x: gated_rms_norm(x, x, torch.ones(5), EPS),
        lambda x: gated_product(torch.ones(2, 5)),
        lambda x: rotate(x[:, None], torch.ones(3, 2), torch.ones(3, 2)),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(call):
    """The kernels themselves would read beyond the end."""
    with use("triton"), pytest.raises((ValueError, RuntimeError)):
        call(torch.ones(2, 4))


def test_every_second_sum_along_a_stream_is_kept_as_its_terms():
    """The bits are those of sums that are kept, and it takes two bytes a number less for each second one."""
    x, deltas = normal(3, 64), [normal(3, 64, dtype=torch.bfloat16, seed=1 + i) for i in range(4)]
    weight = normal(64, seed=9)

    def differentiated() -> tuple[list[Tensor], int]:
        leaves = [x.clone().requires_grad_(), *(delta.clone().requires_grad_() for delta in deltas)]
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        total, normed = leaves[0], []
        with use("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for delta in leaves[1:]:
                total, norm = add_rms_norm(total, delta, weight, EPS, torch.bfloat16)
                normed.append(norm)
        grads = torch.autograd.grad([total, *normed], leaves, [normal(3, 64), *(norm.cos() for norm in normed)])
        return list(grads), sum(storage.nbytes() for storage in kept.values())

    by_terms, bytes_of_terms = differentiated()
    with making_again("nothing"):
        by_sums, bytes_of_sums = differentiated()
    for one, other in zip(by_terms, by_sums, strict=True):
        assert torch.equal(one, other)
    numbers, rest = 3 * 64, 4 * 64 + 4 * 4 * 3  # the weight, and a number per row and norm
    assert bytes_of_sums == 4 * 4 * numbers + rest
    assert bytes_of_terms == (4 + 2 + 4 + 2 + 4) * numbers + rest
