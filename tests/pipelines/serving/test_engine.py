"""Answers drawn together: the same tokens as alone, rows given back, prompts read in between."""

from __future__ import annotations

import random

import pytest
import torch

from bmojo.generation import generate
from pipelines.serving.context import Context, Reading
from pipelines.serving.engine import Engine, Limits, Load, Meter, QueueFullError
from pipelines.serving.job import Answered, Drawing, PromptRead
from tests.pipelines.serving.engines import TOKENIZER, Heard, ask, job_of, odd_model, running
from tests.pipelines.stages.trained_run import TEXT, tiny_model
from tests.pipelines.waiting import wait_until

MODELS = {
    "bmojo,mamba2,bmojo_f": tiny_model, "attention,swa": tiny_model, "gated_deltanet,mamba": tiny_model,
    "mamba2,gated_deltanet,bmojo,mamba,attention": odd_model,
}  # fmt: skip
LONG = TEXT * 2


def drawings() -> list[Drawing]:
    """Sixteen ways to draw, of several lengths."""
    rng = random.Random(0)
    return [
        Drawing(
            max_tokens=rng.randint(1, 12), temperature=rng.choice([0.0, 0.7, 1.3]), top_k=rng.choice([None, 5, 50]),
            top_p=rng.choice([None, 0.9]), seed=seed, ignores_end=True,
        )
        for seed in range(16)
    ]  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("pattern", MODELS)
def test_sixteen_at_once_get_the_tokens_that_each_gets_alone(pattern: str) -> None:
    model = MODELS[pattern](pattern)
    prompts = [LONG[start : start + 5 + 9 * start] for start in range(16)]
    with running(model) as engine:
        alone = [ask(engine, text, drawing).wait() for text, drawing in zip(prompts, drawings(), strict=True)]
        together = [job_of(text, drawing) for text, drawing in zip(prompts, drawings(), strict=True)]
        random.Random(1).shuffle(order := list(range(16)))
        for index in order:
            engine.submit([together[index].job])
        for heard, other in zip(together, alone, strict=True):
            assert heard.wait().tokens == other.tokens
            assert len(heard.tokens[0]) == heard.job.drawing.max_tokens


def test_contexts_are_the_same_bits_alone_and_together() -> None:
    drawing = Drawing(4, 0.0, ignores_end=True)
    with running() as engine:
        alone = ask(engine, LONG, drawing, keeps_context=True).wait().context
        others = [ask(engine, LONG[300 + n :], Drawing(20, ignores_end=True)) for n in range(4)]
        together = ask(engine, LONG, drawing, keeps_context=True).wait().context
        for other in others:
            other.wait()
    assert alone is not None
    assert together is not None
    assert torch.equal(alone.logits_v, together.logits_v)
    for path, x in alone.state.tensors().items():
        assert torch.equal(x, together.state.tensors()[path]), path


def test_a_greedy_answer_is_that_of_generate() -> None:
    model = tiny_model()
    tokens = [TOKENIZER.eod_id, *TOKENIZER.encode_batch([TEXT])[0].tolist()]
    prompt_bt, ids = torch.tensor([tokens]), TOKENIZER.vocab_size
    expected = [int(x) for x in generate(model, prompt_bt, 20, temperature=0, num_token_ids=ids)]
    with running(model) as engine:
        assert ask(engine, tokens, Drawing(20, 0.0, ignores_end=True)).wait().tokens[0] == expected


def test_choices_fork_one_prompt_and_draw_by_their_seeds() -> None:
    with running(limits=Limits(num_rows=2, piece_tokens=8)) as engine:  # of five choices, three wait for a row
        heard = ask(engine, TEXT, Drawing(9, seed=7, ignores_end=True), num_choices=5).wait()
        single = [ask(engine, TEXT, Drawing(9, seed=7 + n, ignores_end=True)).wait().tokens[0] for n in range(5)]
    assert [heard.tokens[choice] for choice in range(5)] == single
    assert len(set(map(tuple, single))) == 5


def read(model: object, tokens: list[int], start: Context | None = None, piece: int = 8) -> Context:
    reading = Reading(model, start, tokens, piece)  # type: ignore[arg-type]
    while not reading.is_done:
        reading.advance()
    assert reading.context is not None
    return reading.context


def test_a_kept_answer_continues_as_if_it_had_been_given() -> None:
    model = tiny_model()
    with running(model) as engine:
        heard = ask(engine, TEXT, Drawing(12, seed=3, ignores_end=True), keeps_context=True).wait()
        assert heard.context is not None
        on = Drawing(10, seed=1, ignores_end=True)
        continued = ask(engine, [], on, start=heard.context).wait()
        forked = ask(engine, [], on, start=heard.context).wait()
        with_text = [ask(engine, " x", on, start=heard.context).wait().tokens for _ in range(2)]
    prompt = read(model, heard.job.tokens)
    again = read(model, heard.tokens[0], prompt)
    assert torch.equal(again.logits_v, heard.context.logits_v)
    assert continued.tokens == forked.tokens
    assert with_text[0] == with_text[1]
    assert int(heard.context.state.position_b) == heard.context.num_tokens == again.num_tokens
    assert len(continued.tokens[0]) == 10


def test_scores_of_a_prompt_are_those_of_one_forward() -> None:
    model = tiny_model()
    heard = job_of(TEXT, Drawing(1, 0.0, num_logprobs=3), scores_prompt=True)
    with running(model) as engine:
        engine.submit([heard.job])
        event = heard.events.get(timeout=300)
    assert isinstance(event, PromptRead)
    with torch.no_grad():
        logits_tv = model(torch.tensor([heard.job.tokens])).logits_btv[0, :, : TOKENIZER.vocab_size]
    log_p_tv = logits_tv.log_softmax(-1)
    assert event.scores[0] is None
    for t, score in enumerate(event.scores[1:], start=1):
        assert score is not None
        assert score.logprob == pytest.approx(float(log_p_tv[t - 1, heard.job.tokens[t]]), abs=1e-4)
        assert next(token for token, _ in score.top) == int(log_p_tv[t - 1].argmax())
        assert len(score.top) == 3


class Turns(Meter):
    """The order of an engine's work."""

    def __init__(self) -> None:
        self.order = ""

    def read(self, num_tokens: int) -> None:
        assert num_tokens <= 8
        self.order += "r"

    def stepped(self, num_rows: int, duration_s: float) -> None:
        self.order += "s"


def test_a_long_prompt_is_read_between_the_tokens_of_others() -> None:
    turns = Turns()
    with running(meter=turns) as engine:
        talking = ask(engine, "x", Drawing(60, ignores_end=True))
        assert isinstance(talking.events.get(timeout=300), PromptRead)
        ask(engine, LONG, Drawing(1, ignores_end=True)).wait()
        talking.wait()
    while_both = turns.order[turns.order.index("s") : turns.order.rindex("r")]
    assert while_both.count("r") > 10
    assert "rr" not in while_both


def test_cancelled_answers_give_their_rows_back() -> None:
    with running(limits=Limits(num_rows=2, queue_size=4, piece_tokens=8)) as engine:
        endless = [ask(engine, "x", Drawing(10**9, ignores_end=True)) for _ in range(6)]
        with pytest.raises(QueueFullError, match="6 answers are under way or wait; with 1 more there would be over 6"):
            ask(engine, "x", Drawing(1))
        for heard in endless:
            heard.job.cancel()
        wait_until(lambda: engine.load() == Load(engine.num_rows, 0, 0))
        assert ask(engine, "x", Drawing(3, ignores_end=True)).wait().reasons == {0: "length"}


def test_an_answer_that_is_ended_keeps_what_was_shown() -> None:
    with running() as engine:
        heard = ask(engine, TEXT, Drawing(10**9, ignores_end=True), keeps_context=True)
        events = [heard.events.get(timeout=300) for _ in range(4)]
        heard.job.end()
        heard.wait()
    shown = [token for event in events if isinstance(event, Answered) for token in event.tokens]
    assert heard.reasons == {0: "stop"}
    assert heard.context is not None
    assert heard.context.num_tokens == len(heard.job.tokens) + len(shown) + len(heard.tokens.get(0, []))


def test_a_storm_of_jobs_leaves_nothing_behind() -> None:
    """Whoever is not cancelled gets what it gets alone, whatever comes and goes beside it."""
    rng = random.Random(3)
    plans = [
        (TEXT[: rng.randint(0, 60)], Drawing(rng.randint(0, 12), seed=n, ignores_end=True), rng.randint(1, 3))
        for n in range(30)
    ]
    with running(limits=Limits(num_rows=3, piece_tokens=8)) as engine:
        heard = []
        for number, (text, drawing, num_choices) in enumerate(plans):
            keeps = num_choices == 1
            heard.append(ask(engine, text, drawing, num_choices=num_choices, keeps_context=keeps))
            if number % 3 == 2:
                rng.choice(heard).job.cancel()
        stayed = [one for one in heard if not one.job.is_cancelled]
        for one in stayed:
            one.wait()
        wait_until(lambda: engine.load() == Load(engine.num_rows, 0, 0))
        for one in rng.sample(stayed, 5):
            again = job_of([], one.job.drawing, num_choices=one.job.num_choices)
            again.job.tokens = one.job.tokens
            engine.submit([again.job])
            assert (again.wait().tokens, again.reasons) == (one.tokens, one.reasons)
            assert len(one.reasons) == one.job.num_choices
            assert (one.context is not None) == one.job.keeps_context
    assert len(stayed) > 15


def test_full_attention_has_room_for_what_it_was_given() -> None:
    with running(tiny_model("attention,swa"), Limits(2, context_tokens=40, piece_tokens=8)) as engine:
        assert engine.room == 40
        for _ in range(3):  # rows are used again, from the beginning
            heard = [ask(engine, TEXT[:20], Drawing(25, ignores_end=True)) for _ in range(4)]
            assert all(len(one.wait().tokens[0]) == 25 for one in heard)


def test_an_engine_that_fails_answers_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_draw", lambda self: 1 / 0)
            broken = [ask(engine, "x", Drawing(3)) for _ in range(3)]
            assert all(isinstance(heard.wait().error, ZeroDivisionError) for heard in broken)
        assert ask(engine, "x", Drawing(3, ignores_end=True)).wait().reasons == {0: "length"}
        assert engine.load().num_waiting == 0


def test_what_is_under_way_fails_when_the_engine_closes() -> None:
    heard: list[Heard] = []
    with running() as engine:
        heard.append(ask(engine, "x", Drawing(10**9, ignores_end=True)))
    assert "stopped" in str(heard[0].wait().error)
    with pytest.raises(QueueFullError, match="stopping"):
        ask(engine, "x", Drawing(1))
