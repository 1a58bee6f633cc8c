"""Parameters, FLOPs and decoding-state bytes of a model, from its config alone.

One multiply-add is two FLOPs; element-wise work (norms, softmax, convolution, RoPE) is not counted, as is customary.
Attention counts the keys a query may look at, averaged over seq_len, not those a tile computes and masks. Backward is
twice forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bmojo.config import ModelConfig
from bmojo.mixers import MIXERS


@dataclass(frozen=True)
class ModelCounts:
    """Counts for a batch of one. Each mapping `..._by_part` sums to its total."""

    num_params: int
    num_params_non_embedding: int  # without embedding and output projection
    forward_flops_per_token: float
    state_bytes: int  # of decoding, float32; full attention at seq_len
    params_by_part: dict[str, int] = field(default_factory=dict)
    flops_by_part: dict[str, float] = field(default_factory=dict)  # forward, per token

    @property
    def train_flops_per_token(self) -> float:
        """Forward and backward."""
        return 3 * self.forward_flops_per_token


def count(config: ModelConfig, seq_len: int) -> ModelCounts:
    """Counts of a model trained at, or read up to, `seq_len` tokens. Raises ValueError if vocab_size is null."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is not set; counts depend on it. Use config.with_vocab_size(n).")
    d, layers, vocab = config.d_model, config.num_layers, config.vocab_size
    params = {"embedding": vocab * d, "head": 0 if config.tie_embeddings else vocab * d, "norms": d}
    flops: dict[str, float] = {"head": 2.0 * vocab * d}
    state_bytes = 0
    for layer, name in enumerate(config.mixers):
        mixer = MIXERS[name].counts(config.of_layer(layer), seq_len)
        for part, number in mixer.params.items():
            params[part] = params.get(part, 0) + number
        for part, amount in mixer.flops.items():
            flops[part] = flops.get(part, 0) + amount
        state_bytes += mixer.state_bytes
    mlp = 3 * d * config.ff_width
    params["mlp"] = layers * mlp
    params["norms"] += layers * d * (2 if config.ff_width else 1)
    flops["mlp"] = 2.0 * layers * mlp
    total = sum(params.values())
    inner = total - params["embedding"] - params["head"]
    return ModelCounts(total, inner, sum(flops.values()), state_bytes, params, flops)
