"""The block's small operators, in C++ and in plain torch, against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch, pointwise
from kernels.innovation_select import innovation_scores, innovation_scores_reference
from kernels.pointwise import (
    add_rms_norm,
    branch,
    cross_entropy_,
    gated,
    gated_product,
    gated_rms_norm,
    rms_norm,
    rotate,
    rotate_both,
    rotate_keys,
    split,
)

pytestmark = pytest.mark.usefixtures("nan_memory")

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative to the largest value
DTYPES = list(TOLERANCE)
EPS = 1e-5
PATHS = ["torch", "cpp"]
SHAPES = [(1, 3), (1, 256), (7, 5), (2, 37, 100), (3, 2, 5, 33), (1, 1), (130, 257)]

Operator = Callable[..., Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


def run(op: Operator, inputs: list[Tensor], path: str) -> list[Tensor]:
    """The output, and the gradients for a random cotangent."""
    leaves = [x.detach().requires_grad_() for x in inputs]  # detach keeps the strides
    with dispatch.use(path):
        out = op(*leaves)
    cotangent = normal(*out.shape, dtype=out.dtype, seed=99)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_exact(op: Operator, exact: Operator, inputs: list[Tensor], path: str) -> None:
    got = run(op, inputs, path)
    want = run(exact, [x.double() for x in inputs], "torch")
    for value, true in zip(got, want, strict=True):
        assert value.shape == true.shape
        assert value.dtype == inputs[0].dtype
        assert (value - true).abs().max() <= TOLERANCE[value.dtype] * max(1.0, true.abs().max().item())
    with torch.no_grad(), dispatch.use(path):  # may take another way
        assert torch.equal(op(*inputs), got[0])


def op_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def op_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return gated_rms_norm(x, gate, weight, EPS)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """More than the blocks of rows of most shapes here, so that some do run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, path):
    assert_exact(
        op_rms_norm, exact_rms_norm, [normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1)], path
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [[0, 1], [0], [1]])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, used, dtype, path):
    def exact(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        both = x + delta, exact_rms_norm(x + delta, weight)
        return torch.cat([both[i] for i in used]) + 0 * weight  # a weight that is not used has no gradient

    def op(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        both = add_rms_norm(x, delta, weight, EPS)
        return torch.cat([both[i] for i in used]) + 0 * weight

    x, wide, weight = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([shape, (*shape, 2), shape[-1:]]))
    assert_exact(op, exact, [x, wide[..., 1], weight], path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [[0, 1, 2], [0, 2], [1, 2], [2], [0, 1]])
@pytest.mark.parametrize("num_rows", [(9, 9, 6), (1, 9, 4), (5, 5, 5), (9, 0, 2)])
def test_branch(num_rows, used, dtype, path):
    def exact(x: Tensor) -> Tensor:
        return torch.cat([x[:, : num_rows[i]] for i in used], 1)

    for x in (normal(3, 9, 5, dtype=dtype), normal(9, 3, 40, dtype=dtype).transpose(0, 1)):
        assert_exact(lambda x: torch.cat([branch(x, num_rows)[i] for i in used], 1), exact, [x], path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [[0, 1, 2], [0, 2], [1], [2]])
@pytest.mark.parametrize("shape", [(2, 5, 12), (70, 12), (12,)])
def test_split(shape, used, dtype, path):
    widths = (5, 6, 1)

    def exact(x: Tensor) -> Tensor:
        parts = x[..., :5], x[..., 5:11], x[..., 11:]
        return torch.cat([parts[i] for i in used], -1)

    assert_exact(
        lambda x: torch.cat([split(x, widths)[i] for i in used], -1), exact, [normal(*shape, dtype=dtype)], path
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gates(shape, dtype, path):
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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "table"),
    [
        ((2, 9, 3, 8), (9,)), ((2, 9, 3, 8), (2, 9)), ((2, 9, 3, 8), ()), ((2, 9, 1, 6), (1, 9)), ((4, 3, 2), (4,)),
        ((4, 3, 10), ()), ((3, 70, 5, 64), (70,)), ((2, 2, 5, 3, 8), (2, 1, 5)), ((1, 1, 1, 2), (1,)),
    ],
)  # fmt: skip
def test_rotate(shape, table, dtype, inverse, path):
    angle = normal(*table, shape[-1] // 2, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    strided = normal(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 1 : 1 + shape[-1]]
    turned = normal(shape[-2], *shape[:-2], shape[-1], dtype=dtype).movedim(0, -2)
    for x in (strided, turned):
        assert_exact(lambda x: rotate(x, cos, sin, inverse), lambda x: exact_rotate(x, angle, inverse), [x], path)
        with dispatch.use(path):
            assert rotate(x, cos, sin, inverse).transpose(-3, -2).is_contiguous()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [[0, 1], [0], [1]])
@pytest.mark.parametrize("second_table", [(), (9,)])
def test_rotate_both(second_table, used, dtype, path):
    angles = normal(9, 4, seed=1), normal(*second_table, 4, seed=2)
    tables = [(angle.cos().to(dtype), angle.sin().to(dtype)) for angle in angles]

    def exact(x: Tensor) -> Tensor:
        return torch.cat([exact_rotate(x, angles[i], False) for i in used])

    for x in (normal(2, 9, 3, 8, dtype=dtype), normal(3, 2, 9, 8, dtype=dtype).movedim(0, -2)):
        assert_exact(lambda x: torch.cat([rotate_both(x, *tables)[i] for i in used]), exact, [x], path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [[0, 1, 2], [0, 2], [1, 2], [0, 1], [0], [1], [2]])
def test_rotate_keys(used, dtype, path):
    angle = normal(9, 4, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def exact(keys_values: Tensor) -> Tensor:
        k, v = keys_values.chunk(2, -2)
        return torch.cat([(exact_rotate(k, angle, False), k, v)[i] for i in used])

    keys_values = normal(2, 9, 6, 8, dtype=dtype)
    assert_exact(lambda x: torch.cat([rotate_keys(x, cos, sin)[i] for i in used]), exact, [keys_values], path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 3), (40, 1001), (1, 30000)])
def test_cross_entropy(rows, classes, dtype, z_loss_weight, with_gradient, path):
    logits = 5 * normal(rows, classes, dtype=dtype) + 30
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(0))
    want = logits.double().clone().requires_grad_()
    with dispatch.use(path):
        nll, log_z = cross_entropy_(logits, target, z_loss_weight, with_gradient)
    assert nll.dtype == log_z.dtype == dtype
    want_nll, want_log_z = F.cross_entropy(want, target, reduction="none"), want.logsumexp(-1)
    torch.testing.assert_close(nll.double(), want_nll, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(log_z.double(), want_log_z, rtol=TOLERANCE[dtype], atol=0)
    if with_gradient:
        (gradient,) = torch.autograd.grad((want_nll + z_loss_weight * want_log_z.square()).sum(), want)
        gradient /= (1 + 2 * z_loss_weight * want_log_z)[:, None].detach()
        assert (logits - gradient).abs().max() <= TOLERANCE[dtype]
        others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, target[:, None], False)
        torch.testing.assert_close(logits[others].double(), gradient[others], rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("path", PATHS)
def test_cross_entropy_of_extreme_logits(path):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, -inf, 1e4], [-1e4, -1e4, -3e38], [nan, 0, 1], [0, 1, inf]])
    with dispatch.use(path):
        nll, log_z = cross_entropy_(logits, torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(logits[:2], torch.tensor([[-1.0, 0, 1], [0.5, -0.5, 0]]))
    torch.testing.assert_close(nll[:2], torch.tensor([1e4, math.log(2)]))
    torch.testing.assert_close(log_z[:2], torch.tensor([1e4, math.log(2) - 1e4]))
    assert logits[2:].isnan().all()  # a loss that diverged has to show
    assert nll[2:].isnan().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", [-1, 4])
def test_targets_that_are_no_class_are_refused(target, path):
    with dispatch.use(path), pytest.raises((IndexError, RuntimeError)):
        cross_entropy_(torch.zeros(2, 4), torch.tensor([0, target]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past", ["none", "documents", "past"])
@pytest.mark.parametrize(
    ("t", "d", "taps", "per_channel"),
    [(1, 4, 4, True), (3, 5, 4, False), (8, 32, 1, True), (21, 40, 3, True), (70, 33, 2, False), (2, 70, 6, True)],
)
def test_innovation_scores(t, d, taps, per_channel, past, dtype, path):
    y = normal(2, t, d + 3, dtype=dtype)[..., 1 : d + 1]
    weight = normal(taps, d if per_channel else 1, seed=1)
    before = normal(2, taps, d, seed=2) if past == "past" else None
    docs = (normal(2, t, seed=3) > 0.8).cumsum(1) if past == "documents" else None
    with dispatch.use(path):
        got = innovation_scores(y, weight, before, docs)
    want = innovation_scores_reference(y.double(), weight, before, docs)
    assert got.dtype == dtype
    assert (got - want).abs().max() <= TOLERANCE[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("path", PATHS)
def test_a_trained_predictor_gets_its_gradient(path):
    y, weight = normal(2, 9, 5), normal(2, 5, seed=1).requires_grad_()
    with dispatch.use(path):
        (got,) = torch.autograd.grad(innovation_scores(y, weight).sum(), weight)
    (want,) = torch.autograd.grad(innovation_scores_reference(y, weight).sum(), weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_finite_differences(path):
    x, gate, weight = (normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 3, 6), (2, 3, 6), (6,)]))
    angle = normal(3, 3, seed=4)
    with dispatch.use(path):
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
    assert all(value.isfinite().all() for value in run(op_gated_rms_norm, [x, gate, weight], path))
    gate[0] = -1e4  # a row of zeros, all but
    assert all(value.isfinite().all() for value in run(op_gated_rms_norm, [x, gate, weight], path))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype, three_threads):
    x, gate = (normal(3, 200, 131, dtype=dtype, seed=i) for i in range(2))
    weight, angle = normal(131, dtype=dtype, seed=2), normal(200, 65, dtype=dtype, seed=3)
    target = torch.arange(600) % 131

    def results() -> list[Tensor]:
        found = run(op_rms_norm, [x, weight], "cpp") + run(gated, [x, gate], "cpp")
        found += run(lambda x: torch.cat(add_rms_norm(x, gate, weight, EPS)), [x], "cpp")
        found += run(op_gated_rms_norm, [x, gate, weight], "cpp") + run(gated_product, [x[..., :130]], "cpp")
        found += run(lambda x: rotate(x[:, :, None, :130], angle, angle), [x], "cpp")
        both = (angle, angle), (angle[0], angle[1])
        found += run(lambda x: torch.cat(rotate_both(x[:, :, None, :130], *both)), [x], "cpp")
        logits = x.flatten(0, 1).clone()
        with dispatch.use("cpp"):
            found += [*cross_entropy_(logits, target, 1e-2), logits, innovation_scores(x, gate[0, :4])]
        return found

    want = results()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True))


@pytest.mark.parametrize("width", [5, 64, 131])
def test_a_row_is_the_same_wherever_it_stands(width):
    """Odd widths also put rows at addresses of every alignment."""
    row, gate, weight = (normal(width, dtype=torch.float32, seed=i) for i in range(3))
    x, gates = row.repeat(70, 1), gate.repeat(70, 1)
    x[50], gates[50] = float("nan"), 1e30
    with dispatch.use("cpp"):
        logits = x.clone()
        results = [rms_norm(x, weight, EPS), gated(x, gates), gated_rms_norm(x, gates, weight, EPS), logits]
        results += cross_entropy_(logits, torch.zeros(70, dtype=torch.long))
        results.append(innovation_scores(x[None], torch.ones(1, 1))[0, 1:])
    x.requires_grad_()
    results.append(run(lambda x: gated_rms_norm(x, gates, weight, EPS), [x], "cpp")[0])
    for result in results:
        others = [i for i in range(len(result)) if i not in (49, 50, 51)]
        assert torch.equal(result[others], result[0].expand_as(result[others]))


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path):
    x, weight = torch.zeros(0, 4), torch.ones(4)
    for value in run(op_rms_norm, [x, weight], path):
        assert value.shape == x.shape or not value.any()
    with dispatch.use(path):
        assert gated_product(x).shape == (0, 2)


def test_half_precision_runs_as_plain_torch():
    x, weight = normal(3, 8, dtype=torch.bfloat16), torch.ones(8)
    with dispatch.use("cpp"):
        assert rms_norm(x, weight, EPS).dtype == torch.bfloat16
        mixed = gated_rms_norm(x.float(), x, weight, EPS)
    with dispatch.use("torch"):
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
        lambda x: cross_entropy_(x, torch.zeros(3, dtype=torch.long)),
        lambda x: innovation_scores(x[None], torch.ones(2, 4), torch.ones(1, 3, 4)),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(call):
    """The kernels themselves would read beyond the end."""
    with dispatch.use("cpp"), pytest.raises((ValueError, RuntimeError)):
        call(torch.ones(2, 4))


def test_an_integer_epsilon_is_a_number_like_any_other():
    x, weight = torch.ones(1, 4), torch.ones(4)
    for path in ("torch", "cpp"):
        with dispatch.use(path):
            torch.testing.assert_close(pointwise.rms_norm(x, weight, 1), torch.full((1, 4), 0.5**0.5))


def test_a_gate_far_below_zero_is_closed():
    with dispatch.use("cpp"):
        out = pointwise.gated(torch.ones(3), torch.tensor([-1e2, -1e30, -1e38]))
    assert (out == 0).all()
