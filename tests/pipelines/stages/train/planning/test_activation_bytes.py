"""Bytes per token that a layer keeps for its backward on a GPU: a copy of a tensor too many would show.

d_model is 64, and so are queries, keys, values and the SSM's channels; d_ff 128. Numbers have 2 bytes, but 4 in the
residual stream.
"""

from __future__ import annotations

import pytest

from bmojo import ModelConfig
from bmojo.fields import ActivationCheckpointing
from pipelines.stages.train.planning.activations import run_whole

ROWS, SEQ_LEN, WINDOW = 2, 512, 64
WIDE = 2 * 64  # bytes of as many channels as the model is wide
BLOCK = 2 * WIDE + WIDE + 4 * WIDE  # the stream before the mixer, what the mixer adds to it; gate and up
ATTENTION = 3 * WIDE + WIDE  # queries, keys and values, which are not rotated; the result
IN_PROJ = 2 * 176  # z, x, B, C and dt, filled up to a multiple of 16
SSM = IN_PROJ + WIDE  # and the scan's result, which the gated norm reads
FADING = (SSM + 3 * WIDE) * (SEQ_LEN - WINDOW) / SEQ_LEN  # and y with its keys and values, as far as they are read
SMALL = {"attention": 16, "mamba2": 29, "bmojo": 43}  # inverses of norms, denominators of heads, step sizes, slots

KEPT = {"attention": BLOCK + ATTENTION, "mamba2": BLOCK + SSM, "bmojo": BLOCK + ATTENTION + FADING}
"""If small results are made again."""
SMALL_RESULTS = {
    # Two norms, of both projections' inputs; 2 bytes for each of a layer's weights
    "attention": 2 * WIDE + 80,
    # and what the convolution gives
    "mamba2": 2 * WIDE + 2 * 96 + 80,
    # and queries rotated twice instead of queries
    "bmojo": 2 * WIDE + 2 * 96 * (SEQ_LEN - WINDOW) / SEQ_LEN + WIDE + 130,
}
"""What is kept beside them otherwise."""


def bytes_per_token(mixer: str, part: ActivationCheckpointing) -> float:
    """Of a third layer."""

    def saved(num_layers: int) -> int:
        config = ModelConfig(
            pattern=f"{mixer}*{num_layers}", d_model=64, d_ff=128, num_heads=2, window_size=WINDOW, chunk_size=32,
            num_eidetic=8, d_state=16, ssm_head_dim=32, ssm_expand=1, vocab_size=64,
        )  # fmt: skip
        return run_whole(config, ROWS, SEQ_LEN, "gpu", bf16=True, checkpointing=part).saved

    return (saved(3) - saved(2)) / (ROWS * SEQ_LEN)


@pytest.mark.parametrize("mixer", list(KEPT))
def test_a_layer_keeps_each_tensor_once(mixer: str) -> None:
    again, most = bytes_per_token(mixer, "pointwise"), KEPT[mixer] + SMALL[mixer]
    assert 0.99 * most < again <= most
    small, most_small = bytes_per_token(mixer, "none") - again, SMALL_RESULTS[mixer]
    assert 0.97 * most_small < small <= most_small


def test_of_a_block_that_is_computed_again_its_input_is_kept() -> None:
    """In two terms, and nothing that they were made of."""
    assert bytes_per_token("attention", "block") == 2 * WIDE + WIDE
