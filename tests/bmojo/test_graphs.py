"""Losses as CUDA graphs. No GPU here: what a capture leaves is stood in for by functions that compute the same; the
capture itself is checked on a GPU (benchmarks.train_step_gpu --check)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from bmojo import graphs
from bmojo.graphs import GraphedLoss, Replay


class Captures:
    """Stands in for graphs.capture: replays compute in the same memory each time, as a graph does."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, loss_of: graphs.Loss, parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]) -> Replay:
        self.count += 1
        held = [x.clone() for x in inputs]
        first = loss_of(*held)
        loss, grad_loss = first.detach().clone(), torch.ones_like(first)
        grads = [None if g is None else g.clone() for g in torch.autograd.grad(first, parameters, allow_unused=True)]

        def forward() -> None:
            loss.copy_(loss_of(*held).detach())

        def backward() -> None:
            with torch.enable_grad():
                found = torch.autograd.grad(loss_of(*held), parameters, grad_loss, allow_unused=True)
            for grad, new in zip(grads, found, strict=True):
                if grad is not None:
                    grad.copy_(new)

        return Replay(held, loss, grad_loss, grads, forward, backward)


@pytest.fixture
def captures(monkeypatch):
    found = Captures()
    monkeypatch.setattr(graphs, "capture", found)
    return found


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope, self.unused = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.ones(1))
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.slope * x).square().sum()


def test_gradients_of_several_batches_add_up_and_are_not_overwritten(captures):
    plain, model = Line(), Line()
    loss = GraphedLoss(model, list(model.parameters()))
    for x in (torch.tensor([1.0, 4.0]), torch.tensor([-2.0, 0.5])):
        (3 * plain(x)).backward()
        result = loss(x)
        (3 * result).backward()
        assert result == plain(x)
    assert torch.equal(model.slope.grad, plain.slope.grad)
    assert model.unused.grad is None
    assert captures.count == 1


def test_gradients_that_are_kept_are_not_overwritten_by_the_next_replay(captures):
    model = Line()
    loss = GraphedLoss(model, list(model.parameters()))
    first = torch.autograd.grad(loss(torch.tensor([1.0, 4.0])), model.slope)[0]
    kept = first.clone()
    torch.autograd.grad(loss(torch.tensor([3.0, 5.0])), model.slope)
    assert torch.equal(first, kept)


def test_a_backward_that_comes_too_late_or_twice_is_an_error(captures):
    model = Line()
    loss = GraphedLoss(model, list(model.parameters()))
    first, second = loss(torch.ones(2)), loss(torch.zeros(2))
    with pytest.raises(RuntimeError, match="before the loss is computed again"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must come once"):
        second.backward()


def test_losses_of_two_calls_are_two_numbers(captures):
    model = Line()
    loss = GraphedLoss(model, list(model.parameters()))
    first = loss(torch.tensor([1.0, 0.0]))
    second = loss(torch.tensor([0.0, 1.0]))
    assert (first.item(), second.item()) == (4.0, 9.0)


def test_each_shape_is_captured_once(captures):
    model = Line()
    loss = GraphedLoss(model, list(model.parameters()))
    for shape in ((2,), (3, 2), (2,), (3, 2)):
        loss(torch.ones(shape)).backward()
    assert captures.count == 2


def test_without_gradient_nothing_is_captured(captures):
    model = Line()
    with torch.no_grad():
        assert GraphedLoss(model, list(model.parameters()))(torch.ones(2)) == 13
    assert captures.count == 0


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch, caplog):
    def refuse(*_: object) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    model = Line()
    loss = GraphedLoss(model, list(model.parameters()))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss(torch.ones(2)).backward()
    assert torch.equal(model.slope.grad, 2 * 2 * torch.tensor([2.0, 3.0]))
    assert len(caplog.records) == 1
    assert "cuda_graphs: false" in caplog.text


def test_a_weight_used_twice_is_cast_twice_so_that_graphs_and_eager_steps_have_the_same_bits():
    torch.manual_seed(0)
    weight, x, other = nn.Parameter(torch.randn(8, 8)), torch.randn(3, 8), torch.randn(3, 8)

    def loss(x: Tensor) -> Tensor:
        return ((x @ weight) * (other @ weight)).sum()

    found = []
    for of in (loss, graphs.uncached(loss)):
        with torch.autocast("cpu", torch.bfloat16):
            result = of(x)
        assert torch.is_autocast_cache_enabled()
        found.append(torch.autograd.grad(result, weight)[0])
    assert not torch.equal(*found)  # with one cast the two gradients are added in bfloat16
    torch.testing.assert_close(*found, rtol=0.05, atol=0.3)
