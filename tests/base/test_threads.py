"""A thread beside a block is told when the block ends, however it ends."""

from __future__ import annotations

import threading

import pytest

from base.threads import beside


def test_it_runs_beside_the_block_and_is_waited_for() -> None:
    began, told = threading.Event(), []

    def work(is_over: threading.Event) -> None:
        began.set()
        told.append((is_over.wait(60), threading.current_thread().name))

    with beside(work, "a thread"):
        assert began.wait(60)
        assert not told
    assert told == [(True, "a thread")]


def test_an_error_in_the_block_ends_it_too() -> None:
    told = threading.Event()

    def work(is_over: threading.Event) -> None:
        if is_over.wait(60):
            told.set()

    with pytest.raises(ValueError, match="of the block"), beside(work, "a thread"):
        raise ValueError("of the block")
    assert told.is_set()


def test_a_thread_that_does_not_end_is_left_behind() -> None:
    let_go = threading.Event()
    with beside(lambda _: let_go.wait(60), "a slow thread", end_s=0):
        pass
    assert "a slow thread" in {thread.name for thread in threading.enumerate()}
    let_go.set()
