"""The presets of configs/models side by side: what is equal between them, and what is not."""

from __future__ import annotations

from collections.abc import Sequence

from base.errors import UserError
from base.names import suggest
from bmojo.config import ModelConfig
from bmojo.counting import count
from pipelines.engine.stage import Facts
from pipelines.loading import model_presets, read_preset


class PresetRow(Facts):
    """A preset, counted for a batch of one."""

    preset: str
    pattern: str
    num_params: int
    state_bytes: int  # of decoding after seq_len tokens, float32
    forward_flops_per_token: float


def list_presets(names: Sequence[str] = (), seq_len: int = 2048, vocab_size: int = 50_304) -> list[PresetRow]:
    """Rows of the named presets, of all if none is named.

    Raises: UserError: there is no such preset.
    """
    known = model_presets()
    for name in names:
        if name not in known:
            raise UserError(f"There is no model preset {name!r}.{suggest(name, known)}")
    return [_row(name, seq_len, vocab_size) for name in names or known]


def _row(name: str, seq_len: int, vocab_size: int) -> PresetRow:
    config = ModelConfig.model_validate({"vocab_size": vocab_size, **read_preset(name)})
    counts = count(config, seq_len)
    return PresetRow(
        preset=name,
        pattern=config.pattern,
        num_params=counts.num_params,
        state_bytes=counts.state_bytes,
        forward_flops_per_token=counts.forward_flops_per_token,
    )
