"""Exponential moving average of the weights (docs/design/0050)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipelines.stages.train.device import exact_device

EMA = "ema"


class WeightAverage:
    """After t steps the average is the mean of w_1, ..., w_t with weights decay^(t - i), which add up to 1.

    So the initial weights have no part in it, and no warm-up of the decay is needed: the first step's weights are the
    first average. In steps: average += (w_t - average) (1 - decay) / (1 - decay^t). A step that was left out does not
    count.
    """

    def __init__(
        self, decay: float, updated: Sequence[torch.Tensor], state: Mapping[torch.Tensor, Mapping[str, torch.Tensor]]
    ) -> None:
        """updated: what the optimizer updates on this rank. state: its state, which holds the averages as `ema`."""
        self._decay = decay
        self._pairs = [(tensor.detach(), state[tensor][EMA]) for tensor in updated if EMA in state.get(tensor, {})]
        device = exact_device(updated[0].device) if updated else None
        self._num_steps = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, applied: torch.Tensor | float = 1.0) -> None:
        """Count the weights after a step. Args: applied: 0 if the step was left out, else 1; may be on the device."""
        self._num_steps += applied
        weight = applied * (1 - self._decay) / (1 - self._decay ** self._num_steps.clamp(min=1))
        for values, average in self._pairs:
            average.lerp_(values, weight.to(average.device, average.dtype))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages."""
        for values, average in self._pairs:
            kept = values.clone()
            values.copy_(average)
            average.copy_(kept)

    def load(self, num_steps: int) -> None:
        """Go on after so many steps, whose average is in the state."""
        self._num_steps.fill_(num_steps)
