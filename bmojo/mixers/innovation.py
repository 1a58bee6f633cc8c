"""How badly the past predicts the fading memory's output: the score by which tokens enter the eidetic memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmojo.fields import ModelFields
from bmojo.mixers.eidetic import EideticState
from kernels.innovation_select import LOWEST, innovation_scores, innovation_step


class InnovationScore(nn.Module):
    """e_i = |y_i - yhat_i|^2 / (|y_i|^2 + eps),  yhat_i = sum_{j=1..K} w_j * y_{i-j}  (docs/model.md).

    Outputs before a document's first are zero. y enters detached: neither the score nor a learned predictor's loss
    reaches the SSM.
    """

    def __init__(self, config: ModelFields) -> None:
        super().__init__()
        self.config, self.taps, self.decay = config, config.innovation_taps, config.innovation_decay
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

    def rank(self, innovation_bt: Tensor, position_bt: Tensor, doc_ids_bt: Tensor | None) -> Tensor:
        """What candidates are compared by: log e, or for `selection: random` a number made of the position in its
        document. Positions and documents may go on after those of the innovation."""
        if self.config.selection == "random":
            in_document_bt = position_bt if doc_ids_bt is None else position_in_document(doc_ids_bt)
            return random_rank(in_document_bt[:, : innovation_bt.shape[1]]).to(innovation_bt.dtype)
        return innovation_bt.clamp_min(LOWEST).log()

    def step(self, y_bd: Tensor, position_b: Tensor, window_v: Tensor, state: EideticState) -> None:
        """Score a token per row, and update the eidetic memory, whose values are in the window's ring."""
        slots, is_random = state.slots, self.config.selection == "random"
        innovation_step(
            y_bd,
            position_b,
            self._weights_of_a_step(y_bd.device),
            state.y,
            state.log_e,
            state.k,
            window_v,
            slots.k,
            slots.v,
            slots.log_e,
            slots.position,
            given_b=random_rank(position_b) if is_random else None,
            chunk_size=self.config.chunk_size,
            tau=self.config.innovation_tau,
        )

    def _weights_of_a_step(self, device: torch.device) -> Tensor:
        """Weights of the predictor; fixed ones are made once, not per token."""
        if self.predictor is not None:
            return self.predictor
        if device not in self._fixed:
            self._fixed[device] = self.exponential_average(device)[:, None]
        return self._fixed[device]


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
