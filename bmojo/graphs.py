"""A training loss as two CUDA graphs, one of the forward and one of the backward.

A step of a model of 100M parameters is over a thousand launches, which take the host longer than the GPU computes them.
Replaying a graph costs the host one. Results are those of the same kernels, to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)
WARM_UP = 3  # runs before the capture, in which kernels are compiled and libraries take their workspace

Loss = Callable[..., Tensor]


def uncached(loss: Loss) -> Loss:
    """The loss, in which autocast keeps no cast of a weight for its next use: in a graph it would be of old weights.

    The gradients of a weight that is used twice are then added in its own precision, not in that of the casts. With it,
    a loss has the same bits with graphs and without.
    """

    def of(*inputs: Tensor) -> Tensor:
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return loss(*inputs)
        finally:
            torch.set_autocast_cache_enabled(before)

    return of


class GraphedLoss:
    """A function of tensors and a model's parameters, captured once for each combination of shapes.

    Args:
        loss: a scalar of tensors without gradient. It may not wait for the GPU, and launches the same kernels for all
            tensors of the same shapes. One backward may follow each call, before the next call.
        parameters: what it is differentiated by. Their memory must stay where it is.
    """

    def __init__(self, loss: Loss, parameters: Sequence[nn.Parameter]) -> None:
        self._loss = uncached(loss)
        self._parameters = tuple(parameter for parameter in parameters if parameter.requires_grad)
        self._graphs: dict[tuple[Any, ...], Replay] = {}
        self._refused = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss. What cannot be captured runs as it is, after a warning."""
        if self._refused or not torch.is_grad_enabled():
            return self._loss(*inputs)
        key = tuple((tuple(x.shape), x.dtype) for x in inputs)
        if key not in self._graphs:
            try:
                self._graphs[key] = capture(self._loss, self._parameters, inputs)
            except RuntimeError as error:
                logger.warning(
                    "training runs without CUDA graphs, which is slower for small models: %s. If that is not expected, "
                    "please report it; cuda_graphs: false in the train stage leaves them out.",
                    str(error).splitlines()[0],
                )
                self._refused = True
                return self._loss(*inputs)
        loss: Tensor = _Replayed.apply(self._graphs[key], inputs, *self._parameters)
        return loss


class Replay:
    """Captured graphs, and the memory they read and write."""

    def __init__(
        self, inputs: Sequence[Tensor], loss: Tensor, grad_loss: Tensor, grads: Sequence[Tensor | None],
        forward: Callable[[], None], backward: Callable[[], None],
    ) -> None:  # fmt: skip
        """forward writes loss, from inputs; backward writes grads, from grad_loss and what forward left."""
        self.inputs, self.loss, self.grad_loss, self.grads = inputs, loss, grad_loss, grads
        self.forward, self.backward = forward, backward
        self.count = 0  # of replays: what a forward leaves is lost with the next one


def capture(loss_of: Loss, parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]) -> Replay:
    """Raises: RuntimeError: something in it cannot be captured."""
    held = [x.clone() for x in inputs]
    in_backward = torch.autocast("cuda", enabled=False)  # where it is never on
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            _run(loss_of, held, parameters, in_backward)
    torch.cuda.current_stream().wait_stream(stream)
    forward, backward, pool = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # Other threads may pin memory meanwhile.
    others: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
    with torch.cuda.stream(torch.cuda.current_stream()):  # so that a failure leaves the current stream as it was
        with torch.cuda.graph(forward, **others):
            loss = loss_of(*held)
        grad_loss = torch.ones_like(loss)
        with in_backward, torch.cuda.graph(backward, **others):
            grads = torch.autograd.grad(loss, parameters, grad_loss, allow_unused=True)
    return Replay(held, loss.detach(), grad_loss, grads, forward.replay, backward.replay)


def _run(loss_of: Loss, inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter], in_backward: Any) -> None:
    """Leaves no autograd graph behind: the capture would take over its nodes, and with them this stream."""
    loss = loss_of(*inputs)
    with in_backward:
        torch.autograd.grad(loss, parameters, allow_unused=True)


class _Replayed(torch.autograd.Function):
    """Results are copied out: the next replay overwrites them."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, inputs: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        for held, given in zip(replay.inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        replay.forward()
        replay.count += 1
        ctx.replay, ctx.count = replay, replay.count
        return replay.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        replay = ctx.replay
        if replay.count != ctx.count:
            raise RuntimeError(
                "the backward of a graphed loss must come once, and before the loss is computed again: what the "
                "forward left is gone. Run it before the next call, or leave graphs out (cuda_graphs: false)."
            )
        replay.count += 1
        replay.grad_loss.copy_(grad_outputs[0])
        replay.backward()
        there = [grad for grad in replay.grads if grad is not None]
        copies = [torch.empty_like(grad) for grad in there]
        torch._foreach_copy_(copies, there)
        found = iter(copies)
        return None, None, *(None if grad is None else next(found) for grad in replay.grads)
