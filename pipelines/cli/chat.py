"""`bmojo chat`: a conversation with a trained model in the terminal."""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from base.errors import DamagedError, UserError
from base.names import suggest
from pipelines.cli.console import RunArgument, StorageOption, console, error_console
from pipelines.cli.models import StageOption, StepOption, TemperatureOption, TopKOption, TopPOption, load_for_decoding
from pipelines.cli.serve import ContextOption, StatesOption, state_store
from pipelines.engine.interrupts import kept_handlers

if TYPE_CHECKING:
    from pipelines.serving.conversation import Conversation

HELP = """/save ID   keep what was said so far, for this command and for bmojo serve
/load ID   go on from what was kept; any number of conversations may
/states    list what is kept
/fork      remember this point; /back returns to it, as often as you like
/back
/reset     forget everything
/help      this text
/exit      leave; so does Ctrl-D. Ctrl-C stops an answer.
A line that begins with two slashes is text that begins with one. A line that ends with a backslash goes on."""


def chat(
    run: RunArgument = None,
    mode: Annotated[
        Literal["plain", "chat"],
        typer.Option(help="plain: the model continues your text. chat: you are User:, and it answers as Assistant:."),
    ] = "plain",
    system: Annotated[str, typer.Option(help="With --mode chat: text before the first line.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer, at most.")] = 200,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 50,
    top_p: TopPOption = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**62, help="Seed of the sampling; left out: another one each time.")
    ] = None,
    load: Annotated[str | None, typer.Option(help="Id of a saved state to begin with.")] = None,
    context_tokens: ContextOption = 4096,
    states: StatesOption = None,
    stage: StageOption = None,
    step: StepOption = None,
    storage: StorageOption = "runs",
) -> None:
    """Talk with a trained model: each turn costs what it adds, however long the conversation is.

    Lines that begin with a slash are commands; /help lists them. Without a terminal it reads lines from standard input
    and writes answers alone to standard output.
    """
    from pipelines.serving.conversation import Conversation
    from pipelines.serving.engine import Engine, Limits
    from pipelines.serving.job import Drawing

    if system and mode == "plain":
        raise UserError("--system is for --mode chat: in plain mode, write the text as your first line.")
    with error_console.status("Loading the model ..."):
        trained = load_for_decoding(storage, run, stage, step)
        store = state_store(trained, states)
        engine = Engine(trained.model, trained.tokenizer, Limits(1, 0, context_tokens=context_tokens))
    drawing = Drawing(tokens, temperature, top_k, top_p, secrets.randbelow(2**62) if seed is None else seed)
    conversation = Conversation(engine, trained.tokenizer, store, drawing, mode, system)
    if load is not None:
        conversation.load(load)
    engine.start()
    try:
        _Terminal(conversation, store.all, sys.stdin.isatty()).run()
    finally:
        engine.close()


class _Terminal:
    """Lines in, answers out."""

    def __init__(self, conversation: Conversation, kept: Callable[[], list[Any]], is_interactive: bool) -> None:
        self._conversation, self._kept, self._is_interactive = conversation, kept, is_interactive
        self._fork: tuple[Any, ...] | None = None

    def run(self) -> None:
        if self._is_interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  line editing and history of input()
            console.print("Type text, or /help. Ctrl-D leaves.")
        with kept_handlers():
            for line in self._lines():
                if line.startswith("/") and not line.startswith("//"):
                    if line.strip() == "/exit":
                        return
                    self._command(line.strip())
                elif line:
                    self._answer(line[1:] if line.startswith("//") else line)

    def _lines(self) -> Iterator[str]:
        """What the user enters, without line ends; several lines where the first ones end with a backslash."""
        begun: list[str] = []
        while True:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                line = input(("... " if begun else "> ") if self._is_interactive else "")
            except EOFError:
                if self._is_interactive:
                    print()
                return
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                print()
                begun = []
                continue
            if line.endswith("\\"):
                begun.append(line[:-1])
            else:
                yield "\n".join([*begun, line])
                begun = []

    def _answer(self, text: str) -> None:
        try:
            with self._interruptible():
                for piece in self._conversation.say(text):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except UserError as error:
            error_console.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.stdout.write("\n")
        sys.stdout.flush()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the answer, and what was shown stays said."""
        signal.signal(signal.SIGINT, lambda *_: self._conversation.interrupt())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "save": self._save, "load": self._load, "states": self._states, "fork": self._remember,
            "back": self._back, "reset": self._reset, "help": lambda _: HELP,
        }  # fmt: skip
        if name not in commands:
            error_console.print(f"There is no command /{name}.{suggest(name, list(commands))}", markup=False)
            return
        try:
            error_console.print(commands[name](argument.strip()), markup=False, soft_wrap=True)
        except (UserError, DamagedError, OSError) as error:
            error_console.print(f"error: {error}", markup=False, soft_wrap=True)

    def _save(self, state_id: str) -> str:
        self._conversation.save(state_id)
        return f"Saved {self._conversation.num_tokens} tokens as {state_id}."

    def _load(self, state_id: str) -> str:
        self._conversation.load(state_id)
        return f"Loaded {state_id}: {self._conversation.num_tokens} tokens."

    def _states(self, _: str) -> str:
        return "\n".join(f"{facts.id}  {facts.num_tokens} tokens" for facts in self._kept()) or "Nothing is kept."

    def _remember(self, _: str) -> str:
        self._fork = (self._conversation.context,)
        return f"Remembered this point, after {self._conversation.num_tokens} tokens. /back returns to it."

    def _back(self, _: str) -> str:
        if self._fork is None:
            raise UserError("there is no point to go back to: /fork remembers one.")
        (self._conversation.context,) = self._fork
        return f"Back after {self._conversation.num_tokens} tokens."

    def _reset(self, _: str) -> str:
        self._conversation.reset()
        return "Forgot everything."
