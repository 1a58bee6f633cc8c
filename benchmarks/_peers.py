"""Models of other libraries, sized to a number of parameters, for benchmarks to compare with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bmojo import BMojoLM, ModelConfig
from bmojo.mixers import MIXERS

PLAIN = "bmojo_plain_torch"  # bmojo itself, its operators as plain torch
PEERS = ("llama", "falcon_h1", "bamba", "mamba2_hf")
LONGEST = 131_072


def base_config(num_layers: int, vocab_size: int) -> ModelConfig:
    """The size at which issue and results are stated: d_model 256, W=256, C=128, M=64."""
    return ModelConfig(
        pattern=f"bmojo*{num_layers}", vocab_size=vocab_size, d_model=256, num_heads=4, window_size=256,
        chunk_size=128, num_eidetic=64, d_state=64, ssm_head_dim=64,
    )  # fmt: skip


def has_gpu(cpu_benchmark: str) -> bool:
    """Whether there is a GPU; if not, say so, and what measures on a CPU."""
    found = torch.cuda.is_available()
    if not found:
        print("error: there is no GPU here (torch.cuda.is_available() is false).\n"
              f"  On a CPU: python -m benchmarks.{cpu_benchmark}", file=sys.stderr)  # fmt: skip
    return found


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(name: str, config: ModelConfig, target: int) -> nn.Module:
    """A model of the given kind with `target` parameters within 2%: the width of its MLPs, or its depth, is fitted."""
    torch.manual_seed(0)
    if name == PLAIN:
        return BMojoLM(config)
    if name in MIXERS:
        pattern = f"{name}*{config.num_layers}"
        return _fit(lambda width: BMojoLM(config.replace(pattern=pattern, d_ff=width)), target, range(64, 4096, 8))
    if name == "mamba2_hf":
        return _fit(lambda depth: _transformers(name, config, depth, 0), target, range(1, 65))
    return _fit(lambda width: _transformers(name, config, config.num_layers, width), target, range(8, 4096, 8))


def loss_of(model: nn.Module, tokens_bt: Tensor, targets_bt: Tensor) -> Tensor:
    """The mean next-token loss, through each library's usual call."""
    if isinstance(model, BMojoLM):
        loss = model(tokens_bt, targets_bt).loss
    else:
        loss = model(input_ids=tokens_bt, labels=tokens_bt, use_cache=False).loss
    assert isinstance(loss, Tensor)
    return loss


def _fit(make: Callable[[int], nn.Module], target: int, sizes: range) -> nn.Module:
    """The model nearest to the target, by bisection on the meta device."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        with torch.device("meta"):
            enough = num_params(make(sizes[middle])) >= target
        low, high = (low, middle) if enough else (middle + 1, high)
    candidates = [sizes[i] for i in {max(0, low - 1), low}]

    def miss(size: int) -> int:
        with torch.device("meta"):
            return abs(num_params(make(size)) - target)

    best = min(candidates, key=miss)
    if miss(best) > 0.03 * target:
        raise ValueError(f"no size in {sizes} comes within 3% of {target} parameters.")
    return make(best)


def _transformers(name: str, config: ModelConfig, num_layers: int, width: int) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    d_model = config.d_model
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": d_model, "num_hidden_layers": num_layers,
        "tie_word_embeddings": True,
    }  # fmt: skip
    attention = {
        "intermediate_size": width, "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_heads,
        "max_position_embeddings": LONGEST, "attn_implementation": "sdpa",
    }  # fmt: skip
    ssm = {"mamba_d_state": config.d_state, "mamba_d_head": config.ssm_head_dim}
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **attention))
    if name == "falcon_h1":
        inner = {"mamba_d_ssm": d_model, "mamba_n_heads": d_model // config.ssm_head_dim}
        return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**common, **attention, **ssm, **inner))
    if name == "bamba":
        inner = {"mamba_expand": 2, "mamba_n_heads": 2 * d_model // config.ssm_head_dim}
        layers = {"attn_layer_indices": list(range(1, num_layers, 2))}
        return transformers.BambaForCausalLM(transformers.BambaConfig(**common, **attention, **ssm, **inner, **layers))
    heads = {"num_heads": 2 * d_model // config.ssm_head_dim, "head_dim": config.ssm_head_dim, "n_groups": 1}
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**common, **heads, state_size=config.d_state, expand=2)
    )
