"""What of the benchmark of decoding on a GPU needs none. Timing itself has been run on a GPU by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import decoding_gpu as benchmark
from benchmarks._peers import base_config, build
from benchmarks.decoding_gpu import Measurement
from tests.bmojo.model_family import PATTERNS, small_config
from tests.bmojo.model_family import build as small_model


def test_without_a_gpu_it_says_so_and_what_else_there_is(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_rows_are_medians_per_token_and_rates_of_all_rows():
    row = benchmark.row_of("bmojo", 4, 1024, Measurement([0.5, 0.25, 0.75], 250, 1_500_000))
    assert row == "| bmojo | 4 | 1,024 | 0.500 | 0.250 .. 0.750 | 8,000 | 250 | 1.5 |"
    assert "out of memory" in benchmark.row_of("llama", 4, 1024, Measurement([], failure="out of memory"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_made_state_has_the_shapes_of_one_that_was_read(pattern):
    model = small_model(small_config(pattern=pattern), dtype=torch.float32)
    made, read = benchmark.made_state(model, 2, 30, 10), model.prefill(torch.zeros(2, 30, dtype=torch.long))[1]
    read.reserve(40)
    assert made.position_b.tolist() == [30, 30]
    shapes = {path: (x.shape, x.dtype) for path, x in read.tensors().items()}
    assert {path: (x.shape, x.dtype) for path, x in made.tensors().items()} == shapes
    reading, num_bytes = benchmark.reader(model, 2, 30, 10)
    assert torch.isfinite(reading()).all()
    assert num_bytes == read.num_bytes()


@torch.no_grad()
def test_llama_on_a_fixed_cache_is_llama_on_its_own():
    from transformers import DynamicCache

    llama = build("llama", base_config(2, 100).replace(d_model=64, num_heads=4), 100_000).eval()
    tokens_bt, own = torch.arange(60).view(3, 20), DynamicCache()
    llama(input_ids=tokens_bt[:, :19], past_key_values=own, use_cache=True)
    read, cache = benchmark.llama_reader(llama, tokens_bt[:, 19], 20)
    for rows, layer in zip(cache.rows, own.layers, strict=True):
        rows[:, :, :, :19] = torch.stack([layer.keys, layer.values])
    want = llama(input_ids=tokens_bt[:, 19:], past_key_values=own, use_cache=True).logits[:, -1]
    torch.testing.assert_close(read(), want, rtol=0, atol=1e-5)
