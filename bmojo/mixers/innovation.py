"""How badly the past predicts the fading memory's output: the score by which tokens enter the eidetic memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmojo.config import ModelConfig

EPS = 1e-6
LOWEST = 1e-30  # keeps the logarithm finite where a prediction is perfect


class InnovationScore(nn.Module):
    """e_i = |y_i - yhat_i|^2 / (|y_i|^2 + eps),  yhat_i = sum_{j=1..K} w_j * y_{i-j}  (DESIGN 3).

    Outputs before a document's first are zero. y enters detached: neither the score nor a learned predictor's loss
    reaches the SSM.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.taps, self.decay = config.innovation_taps, config.innovation_decay
        weight_kd = self.exponential_average()[:, None].repeat(1, config.d_model)
        self.predictor: nn.Parameter | None = None
        if config.innovation_predictor == "learned":
            self.predictor = nn.Parameter(weight_kd)

    def exponential_average(self) -> Tensor:
        """w_1 .. w_K, proportional to decay^j and summing to 1."""
        weight_k = self.decay ** torch.arange(1, self.taps + 1, dtype=torch.float64)
        return (weight_k / weight_k.sum()).float()

    def init_predictor(self) -> None:
        if self.predictor is not None:
            with torch.no_grad():
                self.predictor.copy_(self.exponential_average()[:, None].expand_as(self.predictor))

    def forward(
        self, y_btd: Tensor, past_bkd: Tensor | None = None, doc_ids_bt: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores e_bt (without gradient) of outputs that follow the K outputs `past_bkd`; and the predictor's errors
        e_bt, the same numbers, through which only a learned predictor gets a gradient."""
        y_btd = y_btd.detach()
        y_btd = y_btd.to(torch.promote_types(y_btd.dtype, torch.float32))
        residual_btd = y_btd - self._predict(y_btd, past_bkd, doc_ids_bt)
        errors_bt = residual_btd.square().sum(-1) / (y_btd.square().sum(-1) + EPS)
        return errors_bt.detach(), errors_bt

    def _predict(self, y_btd: Tensor, past_bkd: Tensor | None, doc_ids_bt: Tensor | None) -> Tensor:
        t, taps = y_btd.shape[1], self.taps
        past_bkd = y_btd.new_zeros(y_btd.shape[0], taps, y_btd.shape[2]) if past_bkd is None else past_bkd
        extended = torch.cat([past_bkd.to(y_btd.dtype), y_btd], 1)
        weight = self.exponential_average() if self.predictor is None else self.predictor
        weight = weight.to(device=y_btd.device, dtype=y_btd.dtype)
        yhat_btd = torch.zeros_like(y_btd)
        for lag in range(1, taps + 1):
            earlier = extended[:, taps - lag : taps - lag + t]
            if doc_ids_bt is not None and lag < t:
                same = torch.zeros(doc_ids_bt.shape, dtype=y_btd.dtype, device=y_btd.device)
                same[:, lag:] = (doc_ids_bt[:, lag:] == doc_ids_bt[:, :-lag]).to(y_btd.dtype)
                earlier = earlier * same[..., None]
            yhat_btd = yhat_btd + earlier * weight[lag - 1]
        return yhat_btd


def random_rank(position: Tensor) -> Tensor:
    """A fixed pseudo-random rank for each position of a document, for the ablation `selection: random`."""
    mixed = (position.to(torch.int64) + 0x9E3779B9) * 0x85EBCA6B % (1 << 32)
    mixed = (mixed ^ (mixed >> 15)) * 0xC2B2AE35 % (1 << 32)
    return ((mixed ^ (mixed >> 13)) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def position_in_document(doc_ids_bt: Tensor) -> Tensor:
    """How many tokens of its own document stand before each position, [b, t]."""
    t = torch.arange(doc_ids_bt.shape[1], device=doc_ids_bt.device)
    first_b1 = torch.ones_like(doc_ids_bt[:, :1], dtype=torch.bool)
    starts = torch.cat([first_b1, doc_ids_bt[:, 1:] != doc_ids_bt[:, :-1]], 1)
    return t - torch.where(starts, t, 0).cummax(1).values
