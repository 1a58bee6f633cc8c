"""B'MOJO language model (arXiv:2407.06324) and its special cases: one class, the layer pattern says which.

Departures from a pre-norm Transformer, all inside the mixers:
- fading memory: a state-space model summarises the unbounded past (bmojo/mixers/mamba2.py)
- eidetic memory: tokens its past predicts badly are kept verbatim (bmojo/mixers/innovation.py)
- one attention reads the window, the fading outputs and the kept tokens together (bmojo/mixers/bmojo.py)

Initial values (L layers, std = init_std):
    embeddings, in-projections          normal(0, std)
    out-projections to the residual     normal(0, std / sqrt(2 L))            GPT-2's residual scaling
    SSM output inside bmojo, bmojo_f    normal(0, 1 / sqrt(fan in))           y then has the scale of u (fading.py)
    norms, D, B_bias, C_bias            1
    conv taps                           uniform(+-1 / sqrt(taps))             Mamba-2
    conv taps beside attention          0                                     docs/design/0060
    dt_bias                             softplus^-1(log-uniform[dt_min, dt_max])
    A_log                               log uniform[a_min, a_max] (mamba2), log 1..n (mamba)
    dt_proj (mamba)                     uniform(+-1 / sqrt(rank))
    innovation predictor                exponential average
    fading_gain                         fading_gain, no 1 / sqrt(2 L)          docs/design/0044
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bmojo.config import ModelConfig
from bmojo.fields import ActivationCheckpointing
from bmojo.layers import Linear, Residual, RMSNorm, RotaryTable, SwiGLU, autocast_dtype, residual, terms, total
from bmojo.mixers import MIXERS
from bmojo.mixers.base import LayerMemory, Mixer, MixerOutput, Sequence
from bmojo.prefill import piece_tokens, pieces, prefill
from bmojo.state import DecodingState, LayerState
from kernels.again import MadeAgain, making_again
from kernels.cross_entropy import LossOutputs, linear_cross_entropy

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Checkpoint = Callable[..., Any]
"""torch.utils.checkpoint.checkpoint or the like: calls a function of tensors, again in the backward pass."""
Compiled = Callable[..., Any]
"""A part of the model as some compiler has made it."""


class LMOutput(NamedTuple):
    """What a forward pass gives; see BMojoLM.forward."""

    logits_btv: Tensor | None = None
    loss: Tensor | None = None
    nll_bt: Tensor | None = None
    num_targets: Tensor | None = None
    memory: list[LayerMemory | None] | None = None
    hidden_btd: list[Tensor] | None = None


class Block(nn.Module):
    """x + Mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[mixer](config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps) if config.ff_width else None
        self.mlp = SwiGLU(config) if config.ff_width else None
        self.compiled: Compiled | None = None  # see bmojo.compiled

    def forward(
        self,
        x: Tensor | Residual,
        sequence: Sequence,
        state: LayerState | None = None,
        checkpoint_mixer: Checkpoint | None = None,
    ) -> tuple[Tensor | Residual, MixerOutput]:
        """A piece of a sequence, as Mixer.forward. checkpoint_mixer: what runs the mixer again in the backward pass."""
        if self.compiled is None or state is not None or checkpoint_mixer is not None or sequence.return_memory:
            return self._forward(x, sequence, state, checkpoint_mixer)
        self.mixer.make_tables(sequence.rotary)
        x_btd, predictor_loss = self.compiled(total(x), sequence)
        return x_btd, MixerOutput(x_btd, predictor_loss)

    def of_tensors(self, x_btd: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor | None]:
        """What a compiler is given: the stream after the block, and a predictor's loss."""
        x, mixed = self._forward(x_btd, sequence)
        return total(x), mixed.predictor_loss

    def _forward(
        self,
        x: Tensor | Residual,
        sequence: Sequence,
        state: LayerState | None = None,
        checkpoint_mixer: Checkpoint | None = None,
    ) -> tuple[Tensor | Residual, MixerOutput]:
        u_btd = self.mixer_norm(x)
        if checkpoint_mixer is None:
            mixed = self.mixer(u_btd, sequence, state)
        else:
            mixed = MixerOutput(*checkpoint_mixer(lambda u_btd: self.mixer(u_btd, sequence)[:2], u_btd))
        return self._feed_forward(x + mixed.out_btd), mixed

    def step(
        self, x: Tensor | Residual, position_b: Tensor, rotary: RotaryTable, state: LayerState
    ) -> Tensor | Residual:
        return self._feed_forward(x + self.mixer.step(self.mixer_norm(x), position_b, rotary, state))

    def _feed_forward(self, x: Tensor | Residual) -> Tensor | Residual:
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))


class BMojoLM(nn.Module):
    """A causal language model; weights are initialised with seed 0 at construction."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set; use config.with_vocab_size(tokenizer.vocab_size).")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config.of_layer(i), mixer) for i, mixer in enumerate(config.mixers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights(seed=0)
        self.checkpoint: Checkpoint | None = None
        self.checkpointed: Literal["block", "mixer"] = "block"  # what `checkpoint` is applied to, of each layer
        self.made_again: MadeAgain = "duplicates"  # on a GPU; what `checkpoint` is applied to has its own way
        self.compiled_loss: Compiled | None = None  # see bmojo.compiled

    # Training and scoring

    def forward(
        self,
        tokens_bt: Tensor,
        targets_bt: Tensor | None = None,
        doc_ids_bt: Tensor | None = None,
        return_memory: bool = False,
        token_losses: bool = False,
        return_hidden: bool = False,
        wanted_bt: Tensor | None = None,
    ) -> LMOutput:
        """Score a batch of token sequences.

        Args:
            tokens_bt: token ids.
            targets_bt: the id each position should predict, -100 for none. None: return logits instead of a loss.
            doc_ids_bt: integers, equal within a document and non-decreasing along t; -1 marks padding. None: each row
                is one document. Nothing passes from one document to another.
            return_memory: also return a LayerMemory for every bmojo and bmojo_f layer (None for other layers).
            token_losses: also return nll_bt, the float32 negative log-likelihood of each target, 0 if there is none.
            return_hidden: also return hidden_btd: the embeddings, then the residual stream after each layer, the last
                one normed.
            wanted_bt: bool: the positions that selection=oracle keeps, which must have them; else not read.
        Returns: with targets: loss (mean over targets, with z-loss and a learned innovation predictor's loss if
            configured) and num_targets; logits of the whole batch are never materialised. Without: logits_btv.
        """
        hidden: list[Tensor] | None = [] if return_hidden else None
        with making_again(self.made_again):
            x, predictor_losses, memory = self._stream(tokens_bt, doc_ids_bt, return_memory, hidden, wanted_bt)
        layers = memory if return_memory else None
        if hidden is not None:
            hidden.append(self.norm(x))
        if targets_bt is None:
            return LMOutput(logits_btv=self.head(self.norm(x)), memory=layers, hidden_btd=hidden)
        if self.compiled_loss is None:
            result = self.loss_of_stream(x, targets_bt)
        else:
            result = LossOutputs(*self.compiled_loss(total(x), targets_bt))
        loss = result.loss
        for predictor_loss in predictor_losses:
            loss = loss + self.config.innovation_loss_weight * predictor_loss
        nll_bt = result.nll_s.view_as(tokens_bt) if token_losses else None
        return LMOutput(None, loss, nll_bt, result.num_targets, layers, hidden)

    def checkpoint_activations(self, part: ActivationCheckpointing) -> None:
        """Choose what the backward pass of training computes again, to save memory. Results are the same to the bit.

        Nothing in a model is random, so generators are left alone. A CUDA graph could not keep their state.
        """
        self.checkpointed = "mixer" if part == "attention" else "block"
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        self.checkpoint = None if part in ("none", "pointwise") else again
        self.made_again = "small" if part == "pointwise" else "duplicates"

    def features(self, tokens_bt: Tensor, doc_ids_bt: Tensor | None = None, wanted_bt: Tensor | None = None) -> Tensor:
        """The normed residual stream x_btd that the output projection reads; arguments as forward's."""
        return self.norm(self._stream(tokens_bt, doc_ids_bt, return_memory=False, wanted_bt=wanted_bt)[0])

    def loss_of_stream(self, x: Tensor | Residual, targets_bt: Tensor) -> LossOutputs:
        """What follows the last block: norm, output projection and loss, without a learned predictor's."""
        normed_btd, weight_vd = self.norm(x), self.head.weight
        return linear_cross_entropy(
            normed_btd.flatten(0, 1), weight_vd, targets_bt.flatten(), self.config.z_loss_weight
        )

    def _stream(
        self,
        tokens_bt: Tensor,
        doc_ids_bt: Tensor | None,
        return_memory: bool,
        hidden: list[Tensor] | None = None,
        wanted_bt: Tensor | None = None,
    ) -> tuple[Tensor | Residual, list[Tensor], list[LayerMemory | None]]:
        """The residual stream after the last block, losses of learned predictors, and memories."""
        if 0 in tokens_bt.shape:
            raise ValueError(
                f"tokens_bt is {tuple(tokens_bt.shape)} (rows, tokens); it must have a row, and a token in each."
            )
        t = tokens_bt.shape[1]
        rotary = self._rotary(torch.arange(t, device=tokens_bt.device))
        sequence = Sequence(t, 0, doc_ids_bt, rotary, return_memory, wanted_bt)
        x = self._embed(tokens_bt)
        predictor_losses, memory = [], []
        for block in self._blocks():
            if hidden is not None:
                hidden.append(total(x))
            x, mixed = self._run(block, x, sequence)
            memory.append(mixed.memory)
            if mixed.predictor_loss is not None:
                predictor_losses.append(mixed.predictor_loss)
        return x, predictor_losses, memory

    def _embed(self, tokens: Tensor) -> Tensor | Residual:
        """The residual stream before the first layer."""
        x = self.embedding(tokens)
        if self.config.residual_precision == "compute":
            x = x.to(autocast_dtype(x) or x.dtype)
        return residual(x)

    def _run(self, block: Block, x: Tensor | Residual, sequence: Sequence) -> tuple[Tensor | Residual, MixerOutput]:
        """Run a block; it or its mixer again in the backward pass if `checkpoint` is set, which sees tensors only."""
        if self.checkpoint is None or not torch.is_grad_enabled():
            x, mixed = block(x, sequence)
            return x, mixed
        if self.checkpointed == "mixer":
            x, mixed = block(x, sequence, checkpoint_mixer=self.checkpoint)
            return x, mixed

        def of_tensors(x_btd: Tensor, added_btd: Tensor | None) -> tuple[Tensor | None, ...]:
            x, mixed = block(residual(x_btd, added_btd), sequence)
            return *terms(x), mixed.predictor_loss

        x_btd, added_btd, predictor_loss = self.checkpoint(of_tensors, *terms(x))
        return residual(x_btd, added_btd), MixerOutput(x_btd, predictor_loss)

    def _rotary(self, position: Tensor) -> RotaryTable:
        precise = torch.promote_types(self.dtype, torch.float32)
        return RotaryTable(position, self.config.attention_head_dim, self.config.rope_theta, precise)

    # Decoding

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> DecodingState:
        """The state before the first token. max_tokens: see DecodingState.reserve; None: what grows may grow."""
        device = self.embedding.weight.device
        layers = [block.mixer.init_state(batch_size, device, self.dtype) for block in self._blocks()]
        state = DecodingState(torch.zeros(batch_size, dtype=torch.long, device=device), layers)
        if max_tokens is not None:
            state.reserve(max_tokens)
        return state

    @torch.no_grad()
    def prefill(
        self, tokens_bt: Tensor, state: DecodingState | None = None, valid_bt: Tensor | None = None
    ) -> tuple[Tensor, DecodingState]:
        """Read tokens into a state, in pieces, so that memory does not grow with t.

        Args:
            tokens_bt: at least one token per row.
            state: where to continue; it is not changed. None: the beginning.
            valid_bt: False marks padding, on the left or on the right of a row. None: no padding.
        Returns: logits_bv after each row's last token, and the new state.
        """
        state = self.init_state(tokens_bt.shape[0]) if state is None else state.clone()
        return prefill(self._read, tokens_bt, state, valid_bt)

    def _read(self, tokens_bt: Tensor, start: int, state: DecodingState) -> Tensor:
        """See bmojo.prefill.Reader."""
        normed_btd = torch.empty(0)
        num_rows, num_tokens = tokens_bt.shape
        at_a_time = piece_tokens(num_rows, tokens_bt.is_cuda)
        for first, last in pieces(start, num_tokens, self.config.chunk_size, at_a_time):
            normed_btd = self.read_piece(tokens_bt[:, first:last], start + first, state)
        return self.head(normed_btd[:, -1])

    @torch.no_grad()
    def read_piece(self, tokens_bt: Tensor, start: int, state: DecodingState) -> Tensor:
        """Read one of the pieces that `bmojo.prefill.pieces` cuts, into a state that is updated in place.

        Args: start: position of the first token, that of every row of the state.
        Returns: the normed residual stream x_btd, of which `head` makes logits.
        """
        num_tokens = tokens_bt.shape[1]
        position_t = torch.arange(start, start + num_tokens, device=tokens_bt.device)
        sequence = Sequence(num_tokens, start, None, self._rotary(position_t))
        x = self._embed(tokens_bt)
        for block, layer in zip(self._blocks(), state.layers, strict=True):
            x, _ = block(x, sequence, layer)
        state.position_b += num_tokens
        return self.norm(x)

    @torch.no_grad()
    def step(self, tokens_b: Tensor, state: DecodingState) -> tuple[Tensor, DecodingState]:
        """Read one token per row. Returns logits_bv for the next, and the state, which is updated in place."""
        rotary = self._rotary(state.position_b)
        x = self._embed(tokens_b)
        for block, layer in zip(self._blocks(), state.layers, strict=True):
            x = block.step(x, state.position_b, rotary, layer)
        logits_bv = self.head(self.norm(x))
        state.position_b += 1
        return logits_bv, state

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
        for _, draw in self.draws():
            draw(generator)

    def draws(self) -> Iterator[tuple[nn.Module, Callable[[torch.Generator], object]]]:
        """What sets initial values, in the order of the random numbers, each with the module whose values it sets."""

        def normal(module: nn.Embedding | nn.Linear) -> Callable[[torch.Generator], object]:
            return lambda generator: nn.init.normal_(module.weight, std=self.config.init_std, generator=generator)

        def ones(module: RMSNorm) -> Callable[[torch.Generator], object]:
            return lambda _: nn.init.ones_(module.weight)

        yield self.embedding, normal(self.embedding)
        for module in self.modules():
            if isinstance(module, Linear):
                yield module, module.init_weights
            elif isinstance(module, RMSNorm):
                yield module, ones(module)
        if not self.config.tie_embeddings:
            yield self.head, normal(self.head)
        for block in self._blocks():
            yield block.mixer, block.mixer.init_weights

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer: matrices decay; what stays in float32, norms and embeddings do not."""
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        float32 = float32_names(self)
        for name, parameter in self.named_parameters():
            matrix = parameter.dim() >= 2 and name not in float32 and not name.startswith("embedding.")
            (decayed if matrix else kept).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def float32_names(model: nn.Module) -> set[str]:
    """Names of the parameters that must stay in float32 and out of weight decay, whatever the precision."""
    mixers = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, Mixer)]
    return {f"{prefix}.{name}" for prefix, mixer in mixers for name in mixer.FLOAT32}


def projection_names(model: BMojoLM) -> list[str]:
    """Names of the matrices inside the blocks that multiply features: no embedding, head, norm, convolution or SSM."""
    modules = model.blocks.named_modules(prefix="blocks")
    return [f"{prefix}.weight" for prefix, module in modules if isinstance(module, Linear)]


def to_bfloat16(model: AnyModule) -> AnyModule:
    """Cast the weights, in place, for decoding, which reads all of them for each token; without a copy per token.

    `model.bfloat16()` would cast those too that must stay in float32.
    """
    kept = float32_names(model)
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.bfloat16()
    return model
