"""B'MOJO language model (arXiv:2407.06324) and its special cases: one class, the layer pattern says which.

Departures from a pre-norm Transformer, all inside the mixers:
- fading memory: a state-space model summarises the unbounded past (bmojo/mixers/mamba2.py)
- eidetic memory: tokens its past predicts badly are kept verbatim (bmojo/mixers/innovation.py)
- one attention reads the window, the fading outputs and the kept tokens together (bmojo/mixers/bmojo.py)

Initial values (L layers, std = init_std):
    embeddings, in-projections          normal(0, std)
    out-projections to the residual     normal(0, std / sqrt(2 L))            GPT-2's residual scaling
    SSM output inside bmojo, bmojo_f    normal(0, 1 / sqrt(fan in))           y then has the scale of u
    norms, D                            1
    conv taps                           uniform(+-1 / sqrt(taps))             Mamba-2
    dt_bias                             softplus^-1(log-uniform[dt_min, dt_max])
    A_log                               log uniform[a_min, a_max] (mamba2), log 1..n (mamba)
    dt_proj (mamba)                     uniform(+-1 / sqrt(rank))
    innovation predictor                exponential average
    fading_gain                         0.35, not scaled by 1 / sqrt(2 L)     docs/design/0044
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bmojo.config import ATTENDING, ModelConfig
from bmojo.layers import RMSNorm, RotaryTable, SwiGLU
from bmojo.mixers import LayerMemory, MixerOutput, Sequence, build_mixer
from bmojo.mixers.bmojo import BMojo
from bmojo.mixers.mamba import Mamba
from bmojo.mixers.mamba2 import Mamba2
from bmojo.prefill import prefill
from bmojo.state import DecodingState, LayerState
from kernels.cross_entropy import linear_cross_entropy

SSM_PARAMS = ("A_log", "D", "dt_bias")


# The residual stream, and what the last layer has yet to add to it (None: nothing): the norm that comes next does it.
Stream = tuple[Tensor, Tensor | None]


class LMOutput(NamedTuple):
    """What a forward pass gives; see BMojoLM.forward."""

    logits_btv: Tensor | None = None
    loss: Tensor | None = None
    nll_bt: Tensor | None = None
    num_targets: Tensor | None = None
    memory: list[LayerMemory | None] | None = None
    hidden_btd: list[Tensor] | None = None


class Block(nn.Module):
    """x + Mixer(RMSNorm(x)), then + SwiGLU(RMSNorm(.))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = build_mixer(config.mixers[layer], config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps) if config.ff_width else None
        self.mlp = SwiGLU(config.d_model, config.ff_width) if config.ff_width else None

    def forward(
        self, stream: Stream, sequence: Sequence, state: LayerState | None = None
    ) -> tuple[Stream, MixerOutput]:
        x_btd, normed_btd = self.mixer_norm.of_sum(*stream)
        mixed = self.mixer(normed_btd, sequence, state)
        return self._feed_forward(x_btd, mixed.out_btd), mixed

    def step(self, stream: Stream, position_b: Tensor, rotary: RotaryTable | None, state: LayerState) -> Stream:
        x_bd, normed_bd = self.mixer_norm.of_sum(*stream)
        return self._feed_forward(x_bd, self.mixer.step(normed_bd, position_b, rotary, state))

    def _feed_forward(self, x: Tensor, mixed: Tensor) -> Stream:
        if self.mlp is None or self.mlp_norm is None:
            return x, mixed
        x, normed = self.mlp_norm.of_sum(x, mixed)
        return x, self.mlp(normed)


class BMojoLM(nn.Module):
    """A causal language model; weights are initialised with seed 0 at construction."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set; use config.with_vocab_size(tokenizer.vocab_size).")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights(seed=0)
        self.checkpoint: Callable[..., Any] | None = None
        """torch.utils.checkpoint.checkpoint or the like: recompute each block in the backward pass to save memory."""

    # Training and scoring

    def forward(
        self,
        tokens_bt: Tensor,
        targets_bt: Tensor | None = None,
        doc_ids_bt: Tensor | None = None,
        return_memory: bool = False,
        token_losses: bool = False,
        return_hidden: bool = False,
    ) -> LMOutput:
        """Score a batch of token sequences.

        Args:
            tokens_bt: token ids.
            targets_bt: the id each position should predict, -100 where none. None: return logits instead of a loss.
            doc_ids_bt: integers, equal within a document and non-decreasing along t; -1 marks padding. None: each row
                is one document. Nothing passes from one document to another.
            return_memory: also return a LayerMemory for every bmojo and bmojo_f layer (None for other layers).
            token_losses: also return nll_bt, the float32 negative log-likelihood of each target, 0 where there is none.
            return_hidden: also return hidden_btd: the embeddings, then the residual stream after each layer, the last
                one normed.
        Returns: with targets: loss (mean over targets, with z-loss and a learned innovation predictor's loss where
            configured) and num_targets; logits of the whole batch are never materialised. Without: logits_btv.
        """
        hidden: list[Tensor] | None = [] if return_hidden else None
        x_btd, predictor_losses, memory = self._features(tokens_bt, doc_ids_bt, return_memory, hidden)
        layers = memory if return_memory else None
        if targets_bt is None:
            return LMOutput(logits_btv=self.head(x_btd), memory=layers, hidden_btd=hidden)
        result = linear_cross_entropy(
            x_btd.flatten(0, 1), self.head.weight, targets_bt.flatten(), self.config.z_loss_weight
        )
        loss = result.loss
        for predictor_loss in predictor_losses:
            loss = loss + self.config.innovation_loss_weight * predictor_loss
        nll_bt = result.nll_s.view_as(tokens_bt) if token_losses else None
        return LMOutput(None, loss, nll_bt, result.num_targets, layers, hidden)

    def features(self, tokens_bt: Tensor, doc_ids_bt: Tensor | None = None) -> Tensor:
        """The normed residual stream x_btd that the output projection reads; arguments as forward's."""
        return self._features(tokens_bt, doc_ids_bt, return_memory=False)[0]

    def _features(
        self,
        tokens_bt: Tensor,
        doc_ids_bt: Tensor | None,
        return_memory: bool,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[LayerMemory | None]]:
        if 0 in tokens_bt.shape:
            raise ValueError(
                f"tokens_bt is {tuple(tokens_bt.shape)} (rows, tokens); it must have a row, and a token in each."
            )
        t = tokens_bt.shape[1]
        sequence = Sequence(t, 0, doc_ids_bt, self._rotary(torch.arange(t, device=tokens_bt.device)), return_memory)
        stream: Stream = (self.embedding(tokens_bt), None)
        predictor_losses, memory = [], []
        for block in self._blocks():
            if hidden is not None:
                hidden.append(stream[0] if stream[1] is None else stream[0] + stream[1])
            stream, mixed = self._block(block, stream, sequence)
            memory.append(mixed.memory)
            if mixed.predictor_loss is not None:
                predictor_losses.append(mixed.predictor_loss)
        normed_btd = self.norm.of_sum(*stream)[1]
        if hidden is not None:
            hidden.append(normed_btd)
        return normed_btd, predictor_losses, memory

    def _block(self, block: Block, stream: Stream, sequence: Sequence) -> tuple[Stream, MixerOutput]:
        """Run a block, recomputed in the backward pass if `checkpoint` is set."""
        if self.checkpoint is None or not torch.is_grad_enabled():
            found: tuple[Stream, MixerOutput] = block(stream, sequence)
            return found

        def flat(x_btd: Tensor, delta_btd: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
            (x_btd, delta_btd), mixed = block((x_btd, delta_btd), sequence)  # tensors in tuples would lose gradients
            return x_btd, delta_btd, mixed.predictor_loss

        x_btd, delta_btd, predictor_loss = self.checkpoint(flat, *stream)
        assert delta_btd is not None
        return (x_btd, delta_btd), MixerOutput(delta_btd, predictor_loss)

    def _rotary(self, position: Tensor) -> RotaryTable | None:
        if not ATTENDING & set(self.config.mixers):
            return None
        precise = torch.promote_types(self.dtype, torch.float32)
        return RotaryTable(position, self.config.attention_head_dim, self.config.rope_theta, precise)

    # Decoding

    def init_state(self, batch_size: int) -> DecodingState:
        """The state before the first token."""
        device = self.embedding.weight.device
        layers = [block.mixer.init_state(batch_size, device, self.dtype) for block in self._blocks()]
        return DecodingState(torch.zeros(batch_size, dtype=torch.long, device=device), layers)

    @torch.no_grad()
    def prefill(
        self, tokens_bt: Tensor, state: DecodingState | None = None, valid_bt: Tensor | None = None
    ) -> tuple[Tensor, DecodingState]:
        """Read tokens into a state, in pieces, so that memory does not grow with t.

        Args:
            tokens_bt: at least one token a row.
            state: where to go on from; it is not changed. None: the beginning.
            valid_bt: False marks padding, on the left or on the right of a row. None: no padding.
        Returns: logits_bv after each row's last token, and the new state.
        """
        return prefill(self, tokens_bt, state, valid_bt)

    def read_piece(self, tokens_bt: Tensor, start: int, state: DecodingState) -> Tensor:
        """Continue rows that are all at position `start`, updating the state in place. Returns features x_btd.

        The piece must start on a multiple of chunk_size or end in the chunk where it starts.
        """
        t = tokens_bt.shape[1]
        position_t = torch.arange(start, start + t, device=tokens_bt.device)
        sequence = Sequence(t, start, None, self._rotary(position_t))
        stream: Stream = (self.embedding(tokens_bt), None)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            stream, _ = block(stream, sequence, layer)
        state.position_b += t
        return self.norm.of_sum(*stream)[1]

    @torch.no_grad()
    def step(self, tokens_b: Tensor, state: DecodingState) -> tuple[Tensor, DecodingState]:
        """Read one token a row. Returns logits_bv for the next, and the state, which is updated in place."""
        rotary = self._rotary(state.position_b)
        stream: Stream = (self.embedding(tokens_b), None)
        for block, layer in zip(self._blocks(), state.layers, strict=True):
            stream = block.step(stream, state.position_b, rotary, layer)
        state.position_b += 1
        return self.head(self.norm.of_sum(*stream)[1]), state

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    # Parameters

    def init_weights(self, seed: int) -> None:
        """Set every parameter as the table above says, from `seed` alone; a no-op on the meta device."""
        if self.embedding.weight.is_meta:
            return
        generator = torch.Generator(device=self.embedding.weight.device).manual_seed(seed)
        std = self.config.init_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, nn.Linear) and not (name == "head" and self.config.tie_embeddings):
                nn.init.normal_(module.weight, std=self._linear_std(name, module), generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            if isinstance(module, Mamba | Mamba2):
                module.init_ssm(generator)
            if isinstance(module, BMojo):
                module.init_gain()
                if module.innovation is not None:
                    module.innovation.init_predictor()

    def _linear_std(self, name: str, module: nn.Linear) -> float:
        if name.endswith(".ssm.out_proj"):
            return module.in_features**-0.5
        if name.endswith(("out_proj", "down_proj")):
            return self.config.init_std / math.sqrt(2 * self.config.num_layers)
        return self.config.init_std

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer: matrices decay; SSM parameters, norms and embeddings do not."""
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            matrix = parameter.dim() >= 2 and not is_ssm_param(name) and not name.startswith("embedding.")
            (decayed if matrix else kept).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def is_ssm_param(name: str) -> bool:
    """Whether a parameter of this name must stay in float32 and out of weight decay, whatever the precision."""
    return name.rsplit(".", 1)[-1] in SSM_PARAMS
