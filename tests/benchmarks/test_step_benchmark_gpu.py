"""What of the benchmark of training steps on a GPU needs none. Timing itself has been run on a GPU by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import train_step_gpu as benchmark
from benchmarks._peers import num_params
from benchmarks.train_step_gpu import Measurement
from bmojo import BMojoLM
from bmojo.graphs import GraphedLoss


def test_without_a_gpu_it_says_so_and_what_else_there_is(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_rows_are_medians_and_ratios_to_bmojo():
    row = benchmark.row_of(Measurement([500.0, 250.0, 750.0], 2**31, "", 2**30), 1024, 1 / 4096, 500.0)
    assert row == "2,048 | 500.0 | 250.0 .. 750.0 | 50.0% | 2.00 | 1.00 | 1.00"
    assert benchmark.row_of(Measurement([1000.0], 2**30, "", 2**29), 1024, None, 500.0).endswith(
        "|  | 1.00 | 0.50 | 2.00"
    )
    assert benchmark.row_of(Measurement([], 0, "CUDA out of memory"), 1024, None, 500.0).startswith(
        "CUDA out of memory"
    )


@pytest.mark.parametrize(("size", "millions"), [("116m", 116), ("370m", 391), ("1.4b", 1532)])
def test_models_have_the_size_that_was_asked_for(size, millions):
    with torch.device("meta"):
        model = BMojoLM(benchmark.config_of(benchmark._parse(["--size", size])))
    assert round(num_params(model) / 1e6) == millions


def test_graphs_are_asked_for_by_their_way():
    model = torch.nn.Linear(2, 2)
    assert isinstance(benchmark.loss_function(model, "graphs"), GraphedLoss)
    assert not isinstance(benchmark.loss_function(model, "eager"), GraphedLoss)
