"""How badly the past predicts the fading memory's output: the score that selection by innovation ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmojo.fields import ModelFields
from kernels.innovation_select import innovation_scores


class InnovationScore(nn.Module):
    """e_i = |y_i - yhat_i|^2 / (|y_i|^2 + eps),  yhat_i = sum_{j=1..K} w_j * y_{i-j}  (docs/model.md).

    Outputs before a document's first are zero. y enters detached: neither the score nor a learned predictor's loss
    reaches the SSM.
    """

    def __init__(self, config: ModelFields) -> None:
        super().__init__()
        self.taps, self.decay = config.innovation_taps, config.innovation_decay
        weight_kd = self.exponential_average()[:, None].repeat(1, config.d_model)
        self._fixed: dict[torch.device, Tensor] = {}
        self.predictor: nn.Parameter | None = None
        if config.innovation_predictor == "learned":
            self.predictor = nn.Parameter(weight_kd)

    def exponential_average(self, device: torch.device | None = None) -> Tensor:
        """w_1 .. w_K, proportional to decay^j and summing to 1; filled in on the device, without a copy."""
        weights = [self.decay**j for j in range(1, self.taps + 1)]
        shares = [weight / sum(weights) for weight in weights]
        return torch.stack([torch.full((), share, dtype=torch.float32, device=device) for share in shares])

    def init_predictor(self) -> None:
        if self.predictor is not None:
            with torch.no_grad():
                self.predictor.copy_(self.exponential_average()[:, None].expand_as(self.predictor))

    def forward(
        self, y_btd: Tensor, past_bkd: Tensor | None = None, doc_ids_bt: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores e_bt, without gradient, of outputs that follow the K outputs `past_bkd`; and their mean, the loss of a
        learned predictor (None without gradients), which reaches nothing else."""
        weight_kd = self.exponential_average(y_btd.device)[:, None] if self.predictor is None else self.predictor
        errors_bt = innovation_scores(y_btd.detach(), weight_kd, past_bkd, doc_ids_bt)
        return errors_bt.detach(), errors_bt.mean() if errors_bt.requires_grad else None

    def weights_of_a_step(self, device: torch.device) -> Tensor:
        """Weights of the predictor; fixed ones are made once, not per token."""
        if self.predictor is not None:
            return self.predictor
        if device not in self._fixed:
            self._fixed[device] = self.exponential_average(device)[:, None]
        return self._fixed[device]
