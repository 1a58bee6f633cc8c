"""`bmojo chat`: turns, commands, Ctrl-C; with a terminal and without."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.serving.conversation import Conversation
from pipelines.serving.engine import Engine
from pipelines.serving.job import Drawing
from pipelines.serving.states import StateStore
from tests.pipelines.serving.engines import TOKENIZER, ask, running
from tests.pipelines.serving.served import ROOT, command, environment
from tests.pipelines.stages.trained_run import tiny_model

DRAWING = Drawing(12, 0.7, seed=4, ignores_end=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with running() as engine:
        yield engine


def conversation(engine: Engine, folder: Path, mode: str = "plain", drawing: Drawing = DRAWING) -> Conversation:
    store = StateStore(folder, "run/train", "d" * 64, tiny_model().init_state(1))
    return Conversation(engine, TOKENIZER, store, drawing, mode, "Be short.")  # type: ignore[arg-type]


def test_turns_read_only_what_they_add(engine: Engine, tmp_path: Path) -> None:
    talk = conversation(engine, tmp_path)
    before = 0
    for text in ("def", " function", "x"):
        list(talk.say(text))
        assert talk.num_tokens == before + (before == 0) + len(TOKENIZER.encode_batch([text])[0]) + 12
        before = talk.num_tokens


def test_saved_conversations_fork(engine: Engine, tmp_path: Path) -> None:
    talk = conversation(engine, tmp_path)
    with pytest.raises(UserError, match="nothing was said"):
        talk.save("a")
    list(talk.say("def function"))
    talk.save("a")
    other = conversation(engine, tmp_path)
    other.load("a")
    list(conversation(engine, tmp_path).say("x"))
    assert other.num_tokens == talk.num_tokens
    greedy = Drawing(9, 0.0, ignores_end=True)
    texts = [ask(engine, " x", greedy, start=one.context).wait().texts for one in (talk, other)]
    assert texts[0] == texts[1]
    other.reset()
    assert (other.num_tokens, other.context) == (0, None)


def test_lines_of_a_conversation_are_the_template(engine: Engine, tmp_path: Path) -> None:
    talk = conversation(engine, tmp_path, "chat")
    said = "".join(talk.say("Hi"))
    expected = ask(engine, "Be short.\n\nUser: Hi\nAssistant:", Drawing(12, 0.7, seed=5, ignores_end=True)).wait()
    assert said == expected.texts[0]


def test_an_interrupted_answer_stays_said_as_far_as_it_was_shown(engine: Engine, tmp_path: Path) -> None:
    talk = conversation(engine, tmp_path, drawing=Drawing(10**9, seed=1, ignores_end=True))
    shown = []
    for piece in talk.say("def"):
        shown.append(piece)
        if len(shown) == 5:
            talk.interrupt()
    assert talk.num_tokens >= 2 + 5
    assert list(conversation(engine, tmp_path).say("x"))  # its row is free


def talk_in_a_process(folder: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, "chat", "--states", str(folder / "states"), "--tokens", "5", *options),
        input=lines, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300,
    )  # fmt: skip


@pytest.mark.ci
def test_without_a_terminal_answers_alone_are_printed(tmp_path: Path) -> None:
    lines = "def\n/save a\nx\\\ny\n/load a\n/nope\n/save a\n//slash\n/states\n/fork\nz\n/back\n/exit\nnever\n"
    done = talk_in_a_process(tmp_path, lines, "--temperature", "0")
    assert done.returncode == 0
    said = done.stderr.splitlines()
    first = int(said[0].split()[1])
    assert said[0] == f"Saved {first} tokens as a."
    assert said[1] == f"Loaded a: {first} tokens."
    assert said[2].startswith("There is no command /nope.")
    assert said[3].startswith("error: there is a state 'a' already")
    assert said[4] == f"a  {first} tokens"
    assert said[5].split(",")[0] == "Remembered this point"
    assert said[6].split()[2] == said[5].split()[4]
    assert "never" not in done.stdout


@pytest.mark.ci
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(tmp_path, "chat", "--states", str(tmp_path / "states"), "--tokens", "1000000000"),
        stdin=slave, stdout=slave, stderr=slave, env=environment(TERM="dumb"), cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    shown = read_until(master, b"\n> ")
    os.write(master, b"def\n")
    shown += read_until(master, b"def\n")  # the terminal's echo, then the answer
    for _ in range(3):
        shown += os.read(master, 1000)
    process.send_signal(signal.SIGINT)
    shown += read_until(master, b"\n> ")
    os.write(master, b"/save a\n")
    assert b"Saved" in read_until(master, b"\n> ")
    process.send_signal(signal.SIGINT)  # at the prompt
    read_until(master, b"> ")
    os.write(master, b"\x04")
    assert process.wait(timeout=300) == 0
    os.close(master)


def read_until(descriptor: int, ending: bytes) -> bytes:
    shown, deadline = b"", time.monotonic() + 300
    while not shown.replace(b"\r", b"").endswith(ending):
        assert time.monotonic() < deadline, shown
        shown += os.read(descriptor, 1000)
    return shown
