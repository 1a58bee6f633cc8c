"""What a recording repeats, and what it leaves alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.cpp import recording
from kernels.cpp.recording import record
from kernels.pointwise import rms_norm


def test_kernels_operators_and_writes_are_repeated_on_new_values() -> None:
    x, weight, total = torch.randn(3, 16), torch.randn(16), torch.zeros(3, 16)

    def function() -> Tensor:
        normed = rms_norm(x, weight, 1e-5)
        total.add_(normed.sigmoid())
        return torch.cat([normed @ weight[:, None], total.split(8, 1)[1]], 1)

    again = record(function)
    first = again()
    assert torch.equal(total, rms_norm(x, weight, 1e-5).sigmoid())
    for _ in range(3):
        x.copy_(torch.randn(3, 16))
        before = total.clone()
        assert again() is first
        want = rms_norm(x, weight, 1e-5)
        assert torch.equal(total, before + want.sigmoid())
        assert torch.equal(first[:, :1], want @ weight[:, None])


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x if bool((x > 0).all()) else -x,
        lambda x: x[x > 0].sum() + x,
        lambda x: x.nonzero().sum() + x,
        lambda x: x * x.sum().item(),
    ],
)
def test_what_looks_at_values_runs_as_it_is(look: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([1.0, 2.0])
    again = record(lambda: look(x))
    assert torch.equal(again(), look(x))
    for values in ([-1.0, 2.0], [3.0, 4.0]):
        x.copy_(torch.tensor(values))
        assert torch.equal(again(), look(x))


def test_indices_are_no_look_at_values() -> None:
    x, index = torch.arange(5.0), torch.tensor([1, 3])
    again = record(lambda: x[index] + 1)
    again()
    index.copy_(torch.tensor([0, 4]))
    assert again().tolist() == [1.0, 5.0]


def test_kernels_of_other_threads_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, other = torch.randn(3, 16), torch.ones(16), torch.randn(2, 16)
    found: list[recording.Recording] = []
    made = recording.Recording
    monkeypatch.setattr(recording, "Recording", lambda: found.append(made()) or found[-1])

    def function() -> Tensor:
        thread = threading.Thread(target=lambda: rms_norm(other, weight, 1e-5))
        thread.start()
        thread.join()
        return rms_norm(x, weight, 1e-5)

    record(function)
    alone = record(lambda: rms_norm(x, weight, 1e-5))
    alone()
    assert len(found[0]._calls) == len(found[1]._calls) == 1


def test_an_error_leaves_nothing_recorded() -> None:
    def function() -> Tensor:
        raise RuntimeError("wrong shapes")

    with pytest.raises(RuntimeError, match="wrong shapes"):
        record(function)
    x = torch.randn(3, 16)
    assert torch.equal(rms_norm(x, torch.ones(16), 1e-5), record(lambda: rms_norm(x, torch.ones(16), 1e-5))())
