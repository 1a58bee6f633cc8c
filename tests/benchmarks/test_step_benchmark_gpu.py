"""What of the benchmark of training steps on a GPU needs none. Timing itself has been run on a GPU by hand."""

from __future__ import annotations

import torch

from benchmarks import train_step_gpu as benchmark
from benchmarks.train_step_gpu import Measurement
from bmojo import BMojoLM


def test_without_a_gpu_it_says_so_and_what_else_there_is(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_rows_are_medians_and_ratios_to_bmojo():
    row, ours = benchmark.row_of("bmojo", 1000, 512, Measurement([0.5, 0.25, 0.75], 2**31), 1024, None)
    assert row == "| bmojo | 1,000 | 512 | 2,048 | 500.0 | 250.0 .. 750.0 | 2.0 | 1.00 |"
    row, ours = benchmark.row_of("llama", 1000, 512, Measurement([1.0], 2**30), 1024, ours)
    assert row.endswith("| 1,024 | 1,000.0 | 1,000.0 .. 1,000.0 | 1.0 | 2.00 |")
    row, ours = benchmark.row_of("attention", 1000, 512, Measurement([], 0), 1024, ours)
    assert "out of memory" in row
    assert ours == 0.5


def test_the_model_has_the_width_that_was_asked_for():
    options = benchmark._parse(["--d-model", "256", "--num-layers", "3", "--vocab-size", "100"])
    with torch.device("meta"):
        model = BMojoLM(benchmark.config_of(options))
    assert len(model.blocks) == 3
    assert model.embedding.weight.shape == (100, 256)
