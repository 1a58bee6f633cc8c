"""The block's small operators, in C++ and in plain torch, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import pointwise
from kernels.operator import use
from kernels.pointwise import (
    add_rms_norm,
    branch,
    gated,
    gated_product,
    gated_rms_norm,
    rms_norm,
    rotate,
    rotate_both,
    rotate_keys,
    split,
)
from tests.kernels.helpers import DTYPES, TOLERANCE, assert_close, assert_same_bits, normal, pairwise, run

pytestmark = pytest.mark.usefixtures("nan_memory")

EPS = 1e-5
PATHS = ["torch", "cpp", "static"]
VARIANTS = [(path, dtype) for path in ("cpp", "static") for dtype in DTYPES] + [("torch", torch.float64)]
SHAPES = [(1, 3), (1, 256), (7, 5), (2, 37, 100), (3, 2, 5, 33), (1, 1), (130, 257)]

Operator = Callable[..., Tensor]


def exact_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def exact_gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate / (1 + torch.exp(-gate))


def exact_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return exact_rms_norm(exact_gated(x, gate), weight)


def exact_gated_product(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.split(gate_up.shape[-1] // 2, -1)
    return exact_gated(up, gate)


def exact_rotate(x: Tensor, angle: Tensor, inverse: bool) -> Tensor:
    """As products of complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp((-1j if inverse else 1j) * angle[..., None, :])
    return torch.cat([turned.real, turned.imag], -1)


def assert_exact(op: Operator, exact: Operator, inputs: list[Tensor], path: str) -> None:
    named = {str(i): x for i, x in enumerate(inputs)}
    got = run(path, op, named)
    assert all(value.dtype == inputs[0].dtype for value in got.values())
    assert_close(got, run("torch", exact, named, torch.float64), TOLERANCE)
    with torch.no_grad(), use(path):  # may take another way
        assert torch.equal(op(*inputs), got["out0"])


def chosen(outputs: tuple[Tensor, ...], used: list[int]) -> list[Tensor]:
    """Of one call, so that the gradients of its outputs meet."""
    return [outputs[i] for i in used]


def op_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def op_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return gated_rms_norm(x, gate, weight, EPS)


@pytest.mark.parametrize(("shape", "variant"), pairwise(SHAPES, VARIANTS))
def test_rms_norm(shape, variant):
    path, dtype = variant
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1)
    assert_exact(op_rms_norm, exact_rms_norm, [x, weight], path)


@pytest.mark.parametrize(("shape", "used", "variant"), pairwise(SHAPES, [[0, 1], [0], [1]], VARIANTS))
def test_add_rms_norm(shape, used, variant):
    path, dtype = variant

    def exact(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        both = x + delta, exact_rms_norm(x + delta, weight)
        return torch.cat([both[i] for i in used]) + 0 * weight  # a weight that is not used has no gradient

    def op(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        both = add_rms_norm(x, delta, weight, EPS)
        return torch.cat([both[i] for i in used]) + 0 * weight

    x, wide, weight = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([shape, (*shape, 2), shape[-1:]]))
    assert_exact(op, exact, [x, wide[..., 1], weight], path)


@pytest.mark.parametrize(
    ("num_rows", "used", "variant"),
    pairwise([(9, 9, 6), (1, 9, 4), (5, 5, 5), (9, 0, 2)], [[0, 1, 2], [0, 2], [1, 2], [2], [0, 1]], VARIANTS),
)
def test_branch(num_rows, used, variant):
    path, dtype = variant

    def exact(x: Tensor) -> Tensor:
        return torch.cat([x[:, : num_rows[i]] for i in used], 1)

    for x in (normal(3, 9, 5, dtype=dtype), normal(9, 3, 40, dtype=dtype).transpose(0, 1)):
        assert_exact(lambda x: torch.cat(chosen(branch(x, num_rows), used), 1), exact, [x], path)


@pytest.mark.parametrize(
    ("shape", "used", "variant"),
    pairwise([(2, 5, 12), (70, 12), (12,)], [[0, 1, 2], [0, 2], [1], [2]], VARIANTS),
)
def test_split(shape, used, variant):
    (path, dtype), widths = variant, (5, 6, 1)

    def exact(x: Tensor) -> Tensor:
        parts = x[..., :5], x[..., 5:11], x[..., 11:]
        return torch.cat([parts[i] for i in used], -1)

    assert_exact(lambda x: torch.cat(chosen(split(x, widths), used), -1), exact, [normal(*shape, dtype=dtype)], path)


@pytest.mark.parametrize(("shape", "variant"), pairwise(SHAPES, VARIANTS))
def test_gates(shape, variant):
    path, dtype = variant
    x, gate, weight = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([shape, shape, shape[-1:]]))
    assert_exact(gated, exact_gated, [x, 4 * gate], path)
    assert_exact(gated_product, exact_gated_product, [torch.cat([3 * gate, x], -1)], path)
    assert_exact(op_gated_rms_norm, exact_gated_rms_norm, [x, gate, weight], path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype, path):
    wide = normal(2, 6, 40, dtype=dtype)
    x, gate, weight = wide[..., 3:16], wide[:, :, 20:33], normal(13, 2, dtype=dtype, seed=1)[:, 0]
    heads_first = normal(2, 13, 6, dtype=dtype, seed=2).transpose(1, 2)  # the last dimension lies apart
    for inner in (x, x.transpose(0, 1).contiguous().transpose(0, 1), heads_first):
        assert_exact(op_rms_norm, exact_rms_norm, [inner, weight], path)
        assert_exact(gated, exact_gated, [inner, gate], path)
        assert_exact(op_gated_rms_norm, exact_gated_rms_norm, [inner, gate, weight], path)
        assert_exact(gated_product, exact_gated_product, [inner[..., :12]], path)


@pytest.mark.parametrize(
    ("shapes", "inverse", "variant"),
    pairwise(
        [
            ((2, 9, 3, 8), (9,)),
            ((2, 9, 3, 8), (2, 9)),
            ((2, 9, 3, 8), ()),
            ((2, 9, 1, 6), (1, 9)),
            ((4, 3, 2), (4,)),
            ((4, 3, 10), ()),
            ((3, 70, 5, 64), (70,)),
            ((2, 2, 5, 3, 8), (2, 1, 5)),
            ((1, 1, 1, 2), (1,)),
        ],
        [False, True],
        VARIANTS,
    ),
)
def test_rotate(shapes, inverse, variant):
    (shape, table), (path, dtype) = shapes, variant
    angle = normal(*table, shape[-1] // 2, dtype=torch.float64, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    strided = normal(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 1 : 1 + shape[-1]]
    turned = normal(shape[-2], *shape[:-2], shape[-1], dtype=dtype).movedim(0, -2)
    for x in (strided, turned):
        assert_exact(lambda x: rotate(x, cos, sin, inverse), lambda x: exact_rotate(x, angle, inverse), [x], path)
        with use(path):
            lies_heads_first = rotate(x, cos, sin, inverse).transpose(-3, -2).is_contiguous()
        assert lies_heads_first or path == "static"


@pytest.mark.parametrize(("second_table", "used", "variant"), pairwise([(), (9,)], [[0, 1], [0], [1]], VARIANTS))
def test_rotate_both(second_table, used, variant):
    path, dtype = variant
    angles = [normal(*table, 4, dtype=torch.float64, seed=1 + i) for i, table in enumerate([(9,), second_table])]
    tables = [(angle.cos().to(dtype), angle.sin().to(dtype)) for angle in angles]

    def exact(x: Tensor) -> Tensor:
        return torch.cat([exact_rotate(x, angles[i], False) for i in used])

    for x in (normal(2, 9, 3, 8, dtype=dtype), normal(3, 2, 9, 8, dtype=dtype).movedim(0, -2)):
        assert_exact(lambda x: torch.cat(chosen(rotate_both(x, *tables), used)), exact, [x], path)


@pytest.mark.parametrize(("used", "variant"), pairwise([[0, 1, 2], [0, 2], [1, 2], [0, 1], [0], [1], [2]], VARIANTS))
def test_rotate_keys(used, variant):
    path, dtype = variant
    angle = normal(9, 4, dtype=torch.float64, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def exact(keys_values: Tensor) -> Tensor:
        k, v = keys_values.chunk(2, -2)
        return torch.cat([(exact_rotate(k, angle, False), k, v)[i] for i in used])

    keys_values = normal(2, 9, 6, 8, dtype=dtype)
    assert_exact(lambda x: torch.cat(chosen(rotate_keys(x, cos, sin), used)), exact, [keys_values], path)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_finite_differences(path):
    x, gate, weight = (
        normal(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate([(2, 3, 6), (2, 3, 6), (6,)])
    )
    angle = normal(3, 3, dtype=torch.float64, seed=4)
    with use(path):
        assert torch.autograd.gradcheck(op_rms_norm, (x, weight))
        assert torch.autograd.gradcheck(gated, (x, gate))
        assert torch.autograd.gradcheck(gated_product, (x,))
        assert torch.autograd.gradcheck(op_gated_rms_norm, (x, gate, weight))
        assert torch.autograd.gradcheck(lambda x: rotate(x.unflatten(1, (3, 1)), angle.cos(), angle.sin()), (x,))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_give_no_nan(dtype, path):
    gate = torch.tensor([-1e4, -200.0, -88.5, -87.0, 0.0, 87.0, 88.5, 200.0, 1e4], dtype=dtype).repeat(2, 1)
    x, weight = normal(2, 9, dtype=dtype), normal(9, dtype=dtype, seed=1)
    assert_exact(gated, lambda x, gate: x * F.silu(gate), [x, gate], path)
    assert_exact(gated_product, lambda both: F.silu(both[:, :9]) * both[:, 9:], [torch.cat([gate, x], -1)], path)
    closed = torch.cat([torch.full_like(gate[:1], -1e4), gate[1:]])  # a row of zeros, all but
    for given in (gate, closed):
        results = run(path, op_gated_rms_norm, {"x": x, "gate": given, "weight": weight})
        assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype, each_number_of_threads):
    x, gate = (normal(3, 200, 131, dtype=dtype, seed=i) for i in range(2))
    weight, angle = normal(131, dtype=dtype, seed=2), normal(200, 65, dtype=dtype, seed=3)
    both = (angle, angle), (angle[0], angle[1])
    calls: list[tuple[Operator, dict[str, Tensor]]] = [
        (op_rms_norm, {"x": x, "weight": weight}),
        (gated, {"x": x, "gate": gate}),
        (lambda x: torch.cat(add_rms_norm(x, gate, weight, EPS)), {"x": x}),
        (op_gated_rms_norm, {"x": x, "gate": gate, "weight": weight}),
        (gated_product, {"x": x[..., :130]}),
        (lambda x: rotate(x[:, :, None, :130], angle, angle), {"x": x}),
        (lambda x: torch.cat(rotate_both(x[:, :, None, :130], *both)), {"x": x}),
    ]
    first, *others = ([run("cpp", op, inputs) for op, inputs in calls] for _ in each_number_of_threads)
    for other in others:
        for got, want in zip(other, first, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("width", [5, 64, 131])
def test_a_row_is_the_same_wherever_it_stands(width):
    """Odd widths also put rows at addresses of every alignment."""
    row, gate, weight = (normal(width, seed=i) for i in range(3))
    x, gates = row.repeat(70, 1), gate.repeat(70, 1)
    x[50], gates[50] = float("nan"), 1e30
    with use("cpp"):
        results = [rms_norm(x, weight, EPS), gated(x, gates), gated_rms_norm(x, gates, weight, EPS)]
    results.append(run("cpp", lambda x: gated_rms_norm(x, gates, weight, EPS), {"x": x})["out0"])
    for result in results:
        others = [i for i in range(len(result)) if i not in (49, 50, 51)]
        assert torch.equal(result[others], result[0].expand_as(result[others]))


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path):
    x, weight = torch.zeros(0, 4), torch.ones(4)
    for value in run(path, op_rms_norm, {"x": x, "weight": weight}).values():
        assert value.shape == x.shape or not value.any()
    with use(path):
        assert gated_product(x).shape == (0, 2)


def test_half_precision_runs_as_plain_torch():
    x, weight = normal(3, 8, dtype=torch.bfloat16), torch.ones(8)
    with use("cpp"):
        assert rms_norm(x, weight, EPS).dtype == torch.bfloat16
        mixed = gated_rms_norm(x.float(), x, weight, EPS)
    with use("torch"):
        torch.testing.assert_close(mixed, gated_rms_norm(x.float(), x, weight, EPS), rtol=0, atol=0)


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
    with use("cpp"), pytest.raises((ValueError, RuntimeError)):
        call(torch.ones(2, 4))


def test_an_integer_epsilon_is_a_number_like_any_other():
    x, weight = torch.ones(1, 4), torch.ones(4)
    for path in ("torch", "cpp"):
        with use(path):
            torch.testing.assert_close(pointwise.rms_norm(x, weight, 1), torch.full((1, 4), 0.5**0.5))


def test_a_gate_far_below_zero_is_closed():
    with use("cpp"):
        out = pointwise.gated(torch.ones(3), torch.tensor([-1e2, -1e30, -1e38]))
    assert (out == 0).all()
