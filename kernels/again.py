"""What a backward computes again from tensors that are kept anyway, instead of keeping it too: less memory, same bits.

An operator whose results are cheap says how it made them (`made_by`). Whoever saves tensors for a backward saves them
through `keep`, which takes the tensors they were made of instead. Nothing changes for results of which nobody says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

Give = Callable[[Sequence[Any]], Any]  # a tensor, of those that were saved

_recipes = WeakIdKeyDictionary()  # storage of a result -> Recipe, as long as the storage is there
_sums_of_terms = WeakIdKeyDictionary()  # storages

MadeAgain = Literal["nothing", "duplicates", "small"]
"""nothing: all is kept, for comparison.  duplicates: what is written beside something else, or is kept in another form;
costs next to nothing.  small: also results that cost a pass over memory."""

_made_again: MadeAgain = "duplicates"


class Recipe(NamedTuple):
    """How a storage was made: it is one of the outputs of function(*inputs)."""

    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[Any, ...]
    output: int
    again: Again


class Again:
    """Results of a call, made again for everybody who kept one of them, and gone with the last who asks."""

    def __init__(self) -> None:
        self.expected = 0
        self._results: Sequence[Tensor] | None = None

    def results(self, make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        results = self._results
        if results is None:
            with torch.no_grad():
                results = make()
        self.expected -= 1
        self._results = results if self.expected > 0 else None
        return results


@contextmanager
def making_again(what: MadeAgain) -> Iterator[None]:
    """Within it that is what a later backward makes again."""
    global _made_again
    before, _made_again = _made_again, what
    try:
        yield
    finally:
        _made_again = before


def keeps_small_results() -> bool:
    """Whether results that cost a pass over memory are kept."""
    return _made_again != "small"


def keeps_everything() -> bool:
    """Whether nothing is made again."""
    return _made_again == "nothing"


def made_by(function: Callable[..., Sequence[Tensor]], inputs: tuple[Any, ...], *results: Tensor) -> None:
    """Say that function(*inputs) gives `results` first of all, with the same bits and layout, each in a storage of its
    own; and that the inputs do not change before the backward. Without a gradient in sight it has no effect."""
    if keeps_everything() or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    inputs, again = tree_map_only(Tensor, Tensor.detach, inputs), Again()
    for output, result in enumerate(results):
        _recipes[result.untyped_storage()] = Recipe(function, inputs, output, again)


def is_made(x: Tensor) -> bool:
    """Whether somebody said how x was made."""
    return bool(_recipes) and x.untyped_storage() in _recipes


def note_terms(total: Tensor) -> None:
    """Say that the terms of a sum are kept in its place. Unlike a recipe this keeps nothing alive."""
    _sums_of_terms[total.untyped_storage()] = True


def is_kept_as_terms(x: Tensor) -> bool:
    """Whether terms are kept in place of x."""
    return bool(_sums_of_terms) and x.untyped_storage() in _sums_of_terms


def keep(tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], Callable[[Sequence[Any]], Sequence[Any]]]:
    """What to save in place of these tensors, and the function that gives them back from what was saved."""
    if torch.compiler.is_compiling() or not _recipes:
        return tensors, _as_saved
    saved: list[Tensor | None] = []
    gives = [_give(x, saved) for x in tensors]
    return saved, lambda found: [give(found) for give in gives]


def _as_saved(found: Sequence[Any]) -> Sequence[Any]:
    return found


def _give(x: Any, saved: list[Tensor | None]) -> Give:
    """Adds to `saved` what x, a tensor or a fact, is given back from."""
    if not isinstance(x, Tensor):
        return lambda found: x
    recipe: Recipe | None = _recipes.get(x.untyped_storage())
    if recipe is None:
        saved.append(x)
        at = len(saved) - 1
        return lambda found: found[at]
    leaves, structure = tree_flatten(recipe.inputs)
    gives = [_give(leaf, saved) for leaf in leaves]
    recipe.again.expected += 1
    view = x.shape, x.stride(), x.storage_offset()
    function, output, again = recipe.function, recipe.output, recipe.again

    def give(found: Sequence[Any]) -> Tensor:
        inputs = tree_unflatten([part(found) for part in gives], structure)
        return again.results(lambda: function(*inputs))[output].as_strided(*view)

    return give
