"""Parameters, FLOPs and decoding-state bytes of a model, from its config alone.

One multiply-add is two FLOPs; element-wise work (norms, softmax, convolution, RoPE) is not counted, as is customary.
Attention counts the keys a query may look at, averaged over seq_len, not those a tile computes and masks. The SSD scan
counts what its chunked form needs; inside bmojo and bmojo_f, as far as y is used. Backward is twice forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bmojo.config import ModelConfig
from bmojo.pattern import MixerName
from kernels.cpp.constants import SSD_CHUNK


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
    """Counts of a model trained at, or read up to, `seq_len` tokens. Raises ValueError where vocab_size is null."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is not set; counts depend on it. Use config.with_vocab_size(n).")
    d, layers, vocab = config.d_model, config.num_layers, config.vocab_size
    params = {"embedding": vocab * d, "head": 0 if config.tie_embeddings else vocab * d, "norms": d}
    flops: dict[str, float] = {"head": 2.0 * vocab * d}
    state_bytes = 0
    for name in config.mixers:
        for part, number in _mixer_params(config, name).items():
            params[part] = params.get(part, 0) + number
        for part, amount in _mixer_flops(config, name, seq_len).items():
            flops[part] = flops.get(part, 0) + amount
        state_bytes += _state_bytes(config, name, seq_len)
    mlp = 3 * d * config.ff_width
    params["mlp"] = layers * mlp
    params["norms"] += layers * d * (2 if config.ff_width else 1)
    flops["mlp"] = 2.0 * layers * mlp
    total = sum(params.values())
    inner = total - params["embedding"] - params["head"]
    return ModelCounts(total, inner, sum(flops.values()), state_bytes, params, flops)


def _heads(config: ModelConfig) -> tuple[int, int]:
    """Channels of all query heads, and of all key and value heads together."""
    return config.num_heads * config.attention_head_dim, 2 * config.kv_heads * config.attention_head_dim


def _mixer_params(config: ModelConfig, name: MixerName) -> dict[str, int]:
    d = config.d_model
    if name == "mamba2":
        return {"ssm": _mamba2_params(config, config.ssm_expand)}
    if name == "mamba":
        return {"ssm": _mamba_params(config)}
    queries, keys_values = _heads(config)
    attention = d * queries + d * keys_values + queries * d
    attention += 2 * config.attention_head_dim if config.qk_norm else 0
    if name in ("attention", "swa"):
        return {"attention": attention}
    _require_bmojo(name)
    if config.fading_projections == "separate":
        attention += d * keys_values
    parts = {"attention": attention, "ssm": _mamba2_params(config, config.fading_expand)}
    if config.adds_fading_output:
        parts["fading_gain"] = d
    if _learns_predictor(config, name):
        parts["innovation"] = config.innovation_taps * d
    return parts


def _mamba2_sizes(config: ModelConfig, expand: int) -> tuple[int, int, int]:
    """Inner width, heads, channels through the convolution."""
    inner = config.ssm_inner_width(expand)
    return inner, inner // config.ssm_head_dim, inner + 2 * config.ssm_num_groups * config.d_state


def _mamba2_params(config: ModelConfig, expand: int) -> int:
    inner, heads, conv = _mamba2_sizes(config, expand)
    return (
        config.d_model * (inner + conv + heads) + conv * config.conv_width + 3 * heads + inner + inner * config.d_model
    )


def _mamba_params(config: ModelConfig) -> int:
    d, n, rank = config.d_model, config.mamba_d_state, config.dt_rank
    inner = config.ssm_inner_width(config.ssm_expand)
    projections = d * 2 * inner + inner * (rank + 2 * n) + rank * inner + inner * d
    return projections + inner * config.conv_width + inner * n + 2 * inner


def _mixer_flops(config: ModelConfig, name: MixerName, seq_len: int) -> dict[str, float]:
    if name == "mamba2":
        return _mamba2_flops(config, config.ssm_expand)
    if name == "mamba":
        d, n, rank = config.d_model, config.mamba_d_state, config.dt_rank
        inner = config.ssm_inner_width(config.ssm_expand)
        projections = d * 2 * inner + inner * (rank + 2 * n) + rank * inner + inner * d
        return {"ssm_projections": 2.0 * projections, "ssm_scan": 6.0 * inner * n}
    queries, keys_values = _heads(config)
    window = seq_len if name == "attention" else config.window_size
    projections = config.d_model * (2 * queries + keys_values)
    keys = mean_keys(seq_len, window)
    if name in ("attention", "swa"):
        return {"attention_projections": 2.0 * projections, "attention": 4.0 * queries * keys}
    _require_bmojo(name)
    learned = _learns_predictor(config, name)
    fading = config.fading_positions(seq_len, learned) / seq_len
    scanned = config.ssm_positions(seq_len, learned) / seq_len
    fading_projections = fading * config.d_model * keys_values
    keys = mean_keys(seq_len, 2 * window)
    if name == "bmojo":
        keys += mean_eidetic(config, seq_len)
    flops = {
        "attention_projections": 2.0 * (projections + fading_projections), "attention": 4.0 * queries * keys
    }  # fmt: skip
    return flops | {part: scanned * x for part, x in _mamba2_flops(config, config.fading_expand).items()}


def _require_bmojo(name: MixerName) -> None:
    """All other mixers are counted before. Raises NotImplementedError: nobody has said how to count this one."""
    if name not in ("bmojo", "bmojo_f"):
        raise NotImplementedError(f"mixer {name!r} has no counts: add its parameters, FLOPs and state to {__name__}.")


def _learns_predictor(config: ModelConfig, name: MixerName) -> bool:
    return name == "bmojo" and config.num_eidetic > 0 and config.innovation_predictor == "learned"


def mean_keys(seq_len: int, window_size: int) -> float:
    """Keys in a causal window, averaged over positions."""
    w = min(window_size, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


def mean_eidetic(config: ModelConfig, seq_len: int) -> float:
    """Filled eidetic slots, averaged over positions."""
    total = 0
    for start in range(0, seq_len, config.chunk_size):
        filled = min(config.num_eidetic, max(0, start - config.window_size + 1))
        total += filled * (min(start + config.chunk_size, seq_len) - start)
    return total / seq_len


def _mamba2_flops(config: ModelConfig, expand: int) -> dict[str, float]:
    inner, heads, conv = _mamba2_sizes(config, expand)
    n, groups = config.d_state, config.ssm_num_groups
    projections = config.d_model * (inner + conv + heads) + inner * config.d_model
    within = SSD_CHUNK * (groups * n + inner)
    across = 2 * inner * n
    intervals = SSD_CHUNK * (SSD_CHUNK + 1) * heads
    return {"ssm_projections": 2.0 * projections, "ssm_scan": 2.0 * (within + across + intervals)}


def _state_bytes(config: ModelConfig, name: MixerName, seq_len: int) -> int:
    taps = config.conv_width - 1
    if name == "mamba":
        inner = config.ssm_inner_width(config.ssm_expand)
        return 4 * inner * (taps + config.mamba_d_state)
    if name == "mamba2":
        return _mamba2_state_bytes(config, config.ssm_expand)
    _, keys_values = _heads(config)
    if name == "attention":
        return 4 * seq_len * keys_values
    if name == "swa":
        return 4 * config.window_size * keys_values
    _require_bmojo(name)
    fading = 4 * 2 * config.window_size * keys_values + _mamba2_state_bytes(config, config.fading_expand)
    slots = config.num_eidetic if name == "bmojo" else 0
    if not slots:
        return fading + 4 * config.window_size * keys_values
    recent = config.window_size + config.chunk_size
    scores = 4 * (slots + recent) + 8 * slots + 4 * config.innovation_taps * config.d_model
    return (
        fading + 4 * (recent + slots) * keys_values + 4 * recent * keys_values // 2 + scores
    )  # half: keys before RoPE


def _mamba2_state_bytes(config: ModelConfig, expand: int) -> int:
    inner, _, conv = _mamba2_sizes(config, expand)
    return 4 * ((config.conv_width - 1) * conv + inner * config.d_state)
