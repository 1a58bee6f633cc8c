"""Results that a backward makes again: what is saved in their place, what is given back, and how often it is made."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from kernels import again
from kernels.again import keep, keeps_everything, keeps_small_results, made_by, making_again
from tests.kernels.helpers import normal


class Doubled:
    """x -> (2 x, -x), and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return 2 * x, -x


def restored(tensors: list[Tensor | None]) -> tuple[list[Any], list[Any]]:
    """What is saved in place of the tensors, and what comes back."""
    saved, restore = keep(tensors)
    return list(saved), list(restore(saved))


def test_what_it_was_made_of_is_saved_and_its_views_come_back() -> None:
    x, other = normal(4, 6), normal(3)
    twice, negative = Doubled()(x)
    made_by(Doubled(), (x,), twice, negative)
    tensors = [twice[1:, ::2], None, other, negative.t()]
    saved, back = restored(tensors)
    assert {part.data_ptr() for part in saved if part is not None} == {x.data_ptr(), other.data_ptr()}
    assert back[1] is None
    for tensor, found in zip(tensors, back, strict=True):
        if tensor is not None:
            assert torch.equal(found, tensor)
            assert found.stride() == tensor.stride()
    assert back[0].untyped_storage().data_ptr() != twice.untyped_storage().data_ptr()


def test_results_of_a_call_are_made_once_for_all_who_kept_them() -> None:
    function, x = Doubled(), normal(3)
    twice, negative = Doubled()(x)
    made_by(function, (x,), twice, negative)
    kept = [keep([twice, negative]), keep([twice])]
    for saved, restore in kept:
        restore(saved)
    assert function.calls == 1
    saved, restore = kept[0]
    restore(saved)  # of a graph that was retained: what was made is gone
    assert function.calls > 1


def test_what_a_result_was_made_of_may_be_made_again_too() -> None:
    x = normal(3)
    (twice, _), inner, outer = Doubled()(x), Doubled(), Doubled()
    (four_times, _) = Doubled()(twice)
    made_by(inner, (x,), twice)
    made_by(outer, (twice,), four_times)
    saved, (back,) = restored([four_times])
    assert [part.data_ptr() for part in saved] == [x.data_ptr()]
    assert torch.equal(back, 4 * x)
    assert inner.calls == outer.calls == 1


def test_a_recipe_goes_with_its_result() -> None:
    x = normal(3)
    twice, _ = Doubled()(x)
    made_by(Doubled(), (x,), twice)
    assert again.is_made(twice)
    before = len(again._recipes)
    del twice
    gc.collect()
    assert len(again._recipes) == before - 1


@torch.no_grad()
def test_without_gradients_nothing_is_noted() -> None:
    x = normal(3)
    twice, _ = Doubled()(x)
    made_by(Doubled(), (x,), twice)
    assert not again.is_made(twice)


def test_what_is_made_again_is_chosen_for_a_block_of_code() -> None:
    seen = [(keeps_everything(), keeps_small_results())]
    with making_again("small"):
        seen.append((keeps_everything(), keeps_small_results()))
        with making_again("nothing"):
            seen.append((keeps_everything(), keeps_small_results()))
        seen.append((keeps_everything(), keeps_small_results()))
    default = False, True
    assert [*seen, (keeps_everything(), keeps_small_results())] == [
        default, (False, False), (True, True), (False, False), default,
    ]  # fmt: skip


def test_if_everything_is_kept_no_recipe_is() -> None:
    twice, _ = Doubled()(normal(3))
    with making_again("nothing"):
        made_by(Doubled(), (normal(3),), twice)
    assert not again.is_made(twice)
