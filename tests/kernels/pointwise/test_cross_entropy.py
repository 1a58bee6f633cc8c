"""Cross-entropy that overwrites the logits with their gradient, in C++ and in plain torch, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.operator import use
from kernels.pointwise import cross_entropy_
from tests.kernels.helpers import DTYPES, TOLERANCE, normal, pairwise

pytestmark = pytest.mark.usefixtures("nan_memory")

PATHS = ["torch", "cpp"]


@pytest.mark.parametrize(
    ("size", "kind", "variant"),
    pairwise(
        [(1, 1), (5, 3), (40, 1001), (1, 30000)],
        [(0.0, True), (0.1, True), (0.1, False)],  # weight of the z-loss, and whether there is a gradient
        [("cpp", torch.float64), ("cpp", torch.float32), ("torch", torch.float64), ("torch", torch.float32)],
    ),
)
def test_cross_entropy(size, kind, variant):
    (rows, classes), (z_loss_weight, with_gradient), (path, dtype) = size, kind, variant
    logits = 5 * normal(rows, classes, dtype=dtype) + 30
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(0))
    want = logits.double().clone().requires_grad_()
    with use(path):
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
    with use(path):
        nll, log_z = cross_entropy_(logits, torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(logits[:2], torch.tensor([[-1.0, 0, 1], [0.5, -0.5, 0]]))
    torch.testing.assert_close(nll[:2], torch.tensor([1e4, math.log(2)]))
    torch.testing.assert_close(log_z[:2], torch.tensor([1e4, math.log(2) - 1e4]))
    assert logits[2:].isnan().all()  # a loss that diverged has to show
    assert nll[2:].isnan().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", [-1, 4])
def test_targets_that_are_no_class_are_refused(target, path):
    with use(path), pytest.raises((IndexError, RuntimeError)):
        cross_entropy_(torch.zeros(2, 4), torch.tensor([0, target]))


def results(logits: Tensor, target: Tensor) -> list[Tensor]:
    """Losses, log of the sums, and the gradient that replaces the logits."""
    logits = logits.clone()
    with use("cpp"):
        return [*cross_entropy_(logits, target, 1e-2), logits]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype, each_number_of_threads):
    logits, target = normal(600, 131, dtype=dtype), torch.arange(600) % 131
    first, *others = (results(logits, target) for _ in each_number_of_threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("width", [5, 64, 131])
def test_a_row_is_the_same_wherever_it_stands(width):
    """Odd widths also put rows at addresses of every alignment."""
    logits = normal(width).repeat(70, 1)
    logits[50] = float("nan")
    others = [i for i in range(70) if i != 50]
    for result in results(logits, torch.zeros(70, dtype=torch.long)):
        assert torch.equal(result[others], result[0].expand_as(result[others]))


def test_a_target_for_each_row_is_required():
    """The kernel itself would read beyond the end."""
    with use("cpp"), pytest.raises((ValueError, RuntimeError)):
        cross_entropy_(torch.ones(2, 4), torch.zeros(3, dtype=torch.long))
