"""The decoder records a step once and replays it; what it yields is what eager steps yield. That is shown of recordings
on the CPU, and, for what is about GPUs, of a function that is called again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bmojo import BMojoLM, generation
from bmojo.decoding import MIN_ROOM, Decoder
from bmojo.generation import HostFlag, generate
from bmojo.state import DecodingState
from tests.bmojo.model_family import PATTERNS, build, random_tokens, small_config

GROWS = "attention*2"


class Recorder:
    """Stands for capture: a recording runs the function again, and overwrites one tensor with the result."""

    def __init__(self) -> None:
        self.num_recordings = self.num_replays = 0

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recordings += 1
        held: list[Tensor] = []

        def replay() -> Tensor:
            self.num_replays += 1
            result = function()
            if not held:
                held.append(result.clone())
            return held[0].copy_(result)

        return replay


def steps(read: Callable[[Tensor], Tensor], num_rows: int, count: int = 12) -> list[Tensor]:
    return [read(tokens_b).clone() for tokens_b in random_tokens(count, num_rows, seed=3)]


def eager_steps(model: BMojoLM, state: DecodingState, num_rows: int) -> list[Tensor]:
    """Of a fork of the state."""
    fork = state.clone()
    return steps(lambda tokens_b: model.step(tokens_b, fork)[0], num_rows)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_replays_go_on_as_eager_steps_do(pattern):
    model = build(small_config(pattern=pattern))
    _, state = model.prefill(random_tokens(2, 13))
    record, want = Recorder(), eager_steps(model, state, 2)
    assert_same(steps(Decoder(model, state, max_tokens=13 + 12, record=record).step, 2), want)
    assert (record.num_recordings, record.num_replays) == (1, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_recordings_on_the_cpu_go_on_as_eager_steps_do(pattern, dtype):
    """Also in memory that others have used meanwhile, and with weights that were changed in place."""
    model = build(small_config(pattern=pattern), dtype=dtype)
    _, state = model.prefill(random_tokens(2, 13))
    decoder, want = Decoder(model, state), eager_steps(model, state, 2)
    got = []
    for tokens_b in random_tokens(12, 2, seed=3):
        got.append(decoder.step(tokens_b).clone())
        _ = [torch.full((size,), torch.nan) for size in (8, 32, 64, 128, 256, 512)]
    assert_same(got, want)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    want = eager_steps(model, decoder.state, 2)
    assert_same(steps(decoder.step, 2), want)


def test_a_long_answer_is_not_given_all_its_room_at_once():
    model = build(small_config(pattern=GROWS))
    _, state = model.prefill(random_tokens(1, 13))
    decoder = Decoder(model, state, max_tokens=10**9)
    steps(decoder.step, 1)
    assert decoder.state.room == MIN_ROOM


def test_a_cache_that_is_full_gets_twice_the_room_and_a_new_recording():
    model = build(small_config(pattern=GROWS), dtype=torch.float32)
    _, state = model.prefill(random_tokens(1, MIN_ROOM - 5))
    record, want = Recorder(), eager_steps(model, state, 1)
    decoder = Decoder(model, state, record=record)
    assert state.room == 0
    assert_same(steps(decoder.step, 1), want)
    assert decoder.state.room == 2 * (MIN_ROOM - 5)
    assert record.num_recordings == 1
    steps(decoder.step, 1, count=MIN_ROOM)
    assert decoder.state.room == 4 * (MIN_ROOM - 5)
    assert record.num_recordings == 2


def test_known_tokens_reserve_their_room_and_no_more():
    model = build(small_config(pattern=GROWS))
    _, state = model.prefill(random_tokens(1, 300))
    decoder = Decoder(model, state, max_tokens=312, record=Recorder())
    steps(decoder.step, 1)
    assert decoder.state.room == 312


def test_what_cannot_be_recorded_runs_eagerly_and_says_so(caplog):
    def refuse(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = build(small_config())
    _, state = model.prefill(random_tokens(2, 13))
    want = eager_steps(model, state, 2)
    with caplog.at_level(logging.WARNING, "bmojo.decoding"):
        got = steps(Decoder(model, state, record=refuse).step, 2)
    assert_same(got, want)
    assert [record.message for record in caplog.records] == [
        "decoding runs without a CUDA graph, which takes many times as long: "
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("pattern", ["bmojo*2", GROWS])
def test_another_state_is_copied_into_the_recording_if_it_fits(pattern):
    model, record = build(small_config(pattern=pattern)), Recorder()
    _, state = model.prefill(random_tokens(2, 13))
    decoder = Decoder(model, state, max_tokens=60, record=record)
    steps(decoder.step, 2)
    swapped = decoder.state.select(torch.tensor([1, 0]))
    wanted, recorded = eager_steps(model, swapped, 2), decoder.state.tensors()
    decoder.hold(swapped)
    assert all(x is recorded[path] for path, x in decoder.state.tensors().items())  # whose addresses a graph holds
    assert_same(steps(decoder.step, 2), wanted)
    assert record.num_recordings == 1
    three = swapped.select(torch.tensor([0, 0, 1]))
    wanted = eager_steps(model, three, 3)
    decoder.hold(three)
    assert_same(steps(decoder.step, 3), wanted)
    assert record.num_recordings == 2


class SlowFlag(HostFlag):
    """One that no question finds known, as if the GPU were far behind."""

    def is_known(self) -> bool:
        return False


@pytest.mark.parametrize("pattern", ["bmojo*2", GROWS])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("flag", [HostFlag, SlowFlag])
def test_generation_by_recordings_and_late_flags_yields_the_same(pattern, temperature, flag, monkeypatch):
    model, prompt = build(small_config(pattern=pattern)), random_tokens(3, 9)
    options: dict[str, Any] = {"temperature": temperature, "stop_tokens": {0, 1, 2, 3, 4, 5}}
    want = list(generate(model, prompt, 60, **options))
    monkeypatch.setattr(generation, "Decoder", partial(Decoder, record=Recorder()))
    monkeypatch.setattr(generation, "HostFlag", flag)
    assert_same(list(generate(model, prompt, 60, **options)), want)


def test_a_reserved_cache_refuses_what_it_has_no_room_for():
    model = build(small_config(pattern=GROWS))
    state = model.init_state(1, max_tokens=20)
    assert state.room == 20
    logits, state = model.prefill(random_tokens(1, 19), state)
    want, other = model.prefill(random_tokens(1, 19))
    assert torch.equal(logits, want)
    token_b = random_tokens(1, 1)[0]
    torch.testing.assert_close(model.step(token_b, state)[0], model.step(token_b, other)[0], rtol=0, atol=1e-12)
    for read in (lambda: model.step(token_b, state), lambda: model.prefill(token_b[None], state)):
        with pytest.raises(ValueError, match="room for 20 tokens, and these are 21: reserve more"):
            read()


class NoCopies(TorchFunctionMode):
    """Refuses to make tensors of numbers of the host; a tensor without numbers refuses the way back by itself."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.Tensor.item, torch.Tensor.tolist), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_autocast_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no autocast, not even to ask about."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.usefixtures("no_autocast_question")
def test_a_step_never_asks_a_device_for_a_number(pattern):
    """On tensors without numbers, whose device is not the CPU."""
    with torch.device("meta"):
        model = BMojoLM(small_config(pattern=pattern, innovation_tau=7.0))
        state = model.init_state(2, max_tokens=64)
        tokens_b = torch.zeros(2, dtype=torch.long)
        with NoCopies():
            logits_bv, _ = model.step(tokens_b, state)
    assert logits_bv.shape == (2, 23)
