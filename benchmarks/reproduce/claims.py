"""The claims: what papers say, which trials tell, and the statements that decide. One entry each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.reproduce.statements import Side, Statement
from benchmarks.reproduce.trials import Name

RECALL = "recall/mean_recall"
LOSS, WITHIN, BEYOND = "text/loss", "position/loss_within", "position/loss_beyond"

_TASKS = ("in_context", "noisy", "fuzzy", "copying", "compression", "memorization")
_SIZES = ("small", "large")
_RULES = (
    "innovation",
    "innovation_learned",
    "delta_error",
    "threshold_1",
    "threshold_2",
    "recency",
    "value_norm",
    "random",
)
_ABSTRACT = "[the paper](https://arxiv.org/abs/2407.06324), abstract"
_COMPARABLE = math.log(1.05)  # nats: 5 % of perplexity


@dataclass(frozen=True)
class Column:
    """A column of a claim's table and a place on its plot: a figure of the trials (*first, row)."""

    title: str
    figure: str
    first: Name = ()


@dataclass(frozen=True)
class Plot:
    """What is drawn.

    Attributes:
        over: what the x axis shows: columns (a series per row), rows (a series per column), or the x of a curve.
        is_ordered: lines join the places.
        curve: name of the curve, of which each row's mean over seeds is drawn.
        is_share: figures lie between 0 and 1, so that intervals beyond are cut off.
    """

    over: Literal["columns", "rows", "curve"]
    x_label: str
    y_label: str
    is_ordered: bool = False
    curve: str = ""
    is_share: bool = False


def _shares(over: Literal["columns", "rows"], x_label: str, is_ordered: bool = False) -> Plot:
    return Plot(over, x_label, "share of answers right", is_ordered, is_share=True)


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    Attributes:
        name: of its section, plot and notes.
        sentence: the paper's where it is in quotation marks, else what it claims in our words.
        source: where it stands.
        rows: last part of the trials' names.
        equal: groups of rows, of which these are equal to 2 %: parameters, and bytes of decoding state.
        how: what was done, in a sentence or two.
    """

    letter: str
    name: str
    title: str
    sentence: str
    source: str
    recipe: str
    how: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    plot: Plot
    statements: tuple[Statement, ...]
    equal_params: tuple[tuple[str, ...], ...] = ()
    equal_state: tuple[tuple[str, ...], ...] = ()

    def trials(self) -> Iterator[Name]:
        """Names of the trials in its table."""
        seen = dict.fromkeys((*column.first, row) for column in self.columns for row in self.rows)
        yield from seen


def _larger(text: str, left: str, right: str, above: float = 0.0) -> Statement:
    """The recall of one row is larger than that of another."""
    return Statement(text, Side(RECALL, ((left,),)), Side(RECALL, ((right,),)), above)


def _lower_loss(text: str, left: str, right: str, margin: float = 0.0, figure: str = LOSS) -> Statement:
    """The loss of one row is lower than that of another, or at most `margin` higher."""
    return Statement(text, Side(figure, ((right,),)), Side(figure, ((left,),)), -margin)


def _recall() -> Claim:
    def rows(size: str) -> tuple[str, ...]:
        return tuple(f"{model}_{size}" for model in ("bmojo", "bmojo_f", "mamba2", "hybrid"))

    groups = tuple(rows(size) for size in _SIZES)
    return Claim(
        letter="a",
        name="recall",
        title="Associative recall by architecture, pairs and memory size",
        sentence="“We test B'MOJO on transductive inference tasks, such as associative recall, where it outperforms "
        "existing SSMs and Hybrid models”",
        source=_ABSTRACT,
        recipe="recall",
        how="Documents of 256 tokens begin with 4, 8 or 16 pairs of key and value; noise follows. Queries come 128 "
        "tokens or more behind their values. Small and large are decoding states of about 70 and 104 kB. The hybrid is "
        "a layer of Mamba-2 and one of sliding-window attention, whose window takes what its state leaves. Attention "
        "has a state that grows, and shows what can be learnt.",
        rows=(*groups[0], *groups[1], "attention"),
        columns=(
            Column("all", RECALL),
            *(Column(f"{number} pairs", f"recall/pairs{number}_accuracy") for number in (4, 8, 16)),
        ),
        plot=_shares("columns", "pairs of key and value", is_ordered=True),
        statements=tuple(
            _larger(f"B'MOJO recalls more than {model}, {size} states", f"bmojo_{size}", f"{row}_{size}")
            for size in _SIZES
            for row, model in (("mamba2", "Mamba-2"), ("hybrid", "the hybrid"), ("bmojo_f", "B'MOJO-F"))
        ),
        equal_params=((*groups[0], "attention"), groups[1]),
        equal_state=groups,
    )


def _memory() -> Claim:
    return Claim(
        letter="b",
        name="memory",
        title="More eidetic memory, more recall, to saturation",
        sentence="Recall grows with the eidetic memory until all that is asked for fits in.",
        source="arXiv:2407.06324, in our words",
        recipe="memory",
        how="Eight pairs of key and value (16 tokens), then noise; queries come 64 tokens or more behind their values. "
        "Nothing but the number of eidetic slots differs.",
        rows=("0", "2", "4", "8", "16", "32", "64"),
        columns=(Column("accuracy", RECALL),),
        plot=_shares("rows", "eidetic slots", is_ordered=True),
        statements=(
            _larger("8 slots recall more than none", "8", "0"),
            _larger("16 slots recall more than 8", "16", "8"),
            _larger("64 slots recall at most 0.02 more than 32", "32", "64", -0.02),
        ),
        equal_params=(("2", "4", "8", "16", "32", "64"),),
    )


def _mad() -> Claim:
    rows = ("bmojo", "mamba2", "hybrid", "attention")

    def mean(row: str) -> Side:
        return Side(RECALL, tuple((task, row) for task in _TASKS))

    return Claim(
        letter="c",
        name="mad",
        title="The six tasks of MAD",
        sentence="“We test B'MOJO on transductive inference tasks, such as associative recall, where it outperforms "
        "existing SSMs and Hybrid models”",
        source=f"{_ABSTRACT}; the tasks are those of [MAD](https://arxiv.org/abs/2403.17844)",
        recipe="mad",
        how="A model per task, of documents of 32 to 64 tokens, in fuzzy recall of 28 to 84 tokens. States differ: see "
        "the table. Copying and compression ask for everything that was read, memorization for what only weights can "
        "know.",
        rows=rows,
        columns=tuple(Column(task.replace("_", "-"), RECALL, (task,)) for task in _TASKS),
        plot=_shares("columns", ""),
        statements=(
            Statement("In the mean over tasks B'MOJO is better than Mamba-2", mean("bmojo"), mean("mamba2")),
            Statement("In the mean over tasks B'MOJO is better than the hybrid", mean("bmojo"), mean("hybrid")),
        ),
        equal_params=(rows,),
    )


_TEXT_ROWS = ("attention", "mamba2", "bmojo", "bmojo_residual")


def _perplexity() -> Claim:
    return Claim(
        letter="d",
        name="perplexity",
        title="Perplexity at equal parameters",
        sentence="“B'MOJO achieves perplexity comparable to similarly-sized Transformers and SSMs”",
        source=_ABSTRACT,
        recipe="text",
        how="Four layers on the Python standard library, equal tokens and parameters. `bmojo` is the paper's layer; "
        "`bmojo_residual` adds the state-space model's output to the layer's. Comparable means: perplexity at most "
        "5 % higher.",
        rows=_TEXT_ROWS,
        columns=(Column("perplexity", "text/perplexity"),),
        plot=Plot("rows", "", "perplexity"),
        statements=tuple(
            _lower_loss(f"{title} is comparable to {other}", row, base, _COMPARABLE)
            for row, title in (("bmojo", "B'MOJO"), ("bmojo_residual", "B'MOJO with y in the residual stream"))
            for base, other in (("attention", "the Transformer"), ("mamba2", "Mamba-2"))
        ),
        equal_params=(_TEXT_ROWS,),
    )


def _length() -> Claim:
    return Claim(
        letter="e",
        name="length",
        title="Sixteen times the training length",
        sentence="“B'MOJO's ability to modulate eidetic and fading memory results in better inference on longer "
        "sequences”",
        source=_ABSTRACT,
        recipe="text",
        how="The models of (d) on the longest documents of the validation split, up to 16 times the training length. "
        "Each document begins with an empty memory. Points of the plot are means over half an octave.",
        rows=_TEXT_ROWS,
        columns=(Column("within the training length", WITHIN), Column("beyond it", BEYOND)),
        plot=Plot("curve", "position (tokens)", "perplexity", curve="position/perplexity_by_position"),
        statements=(
            Statement(
                "B'MOJO's loss is not higher beyond the training length than within it",
                Side(WITHIN, (("bmojo",),)),
                Side(BEYOND, (("bmojo",),)),
            ),
            _lower_loss("Beyond it B'MOJO is better than the Transformer", "bmojo", "attention", figure=BEYOND),
            _lower_loss("Beyond it B'MOJO is better than Mamba-2", "bmojo", "mamba2", figure=BEYOND),
            _lower_loss(
                "Beyond it B'MOJO with y in the residual stream is better than Mamba-2",
                "bmojo_residual",
                "mamba2",
                figure=BEYOND,
            ),
        ),
        equal_params=(_TEXT_ROWS,),
    )


def _drift() -> Claim:
    def better(text: str, data: str, left: str, right: str) -> Statement:
        return Statement(text, Side(RECALL, ((data, left),)), Side(RECALL, ((data, right),)))

    return Claim(
        letter="f",
        name="drift",
        title="Drifting data and the forgetting time",
        sentence="With a forgetting time tau old surprises give way to new ones. Where facts are replaced, a memory "
        "that forgets answers better; where they stay, it answers worse.",
        source="[the model's definition](../../docs/model.md), in our words",
        recipe="drift",
        how="Drifting: four phases of 40 tokens, each of which gives the same four keys other values; asked for are "
        "those of the phase. Steady: four pairs at the beginning, asked for 64 to 161 tokens later. There are twelve "
        "slots; keys in them have no position.",
        rows=("never", "tau_160", "tau_40", "tau_10"),
        columns=(Column("drifting", RECALL, ("drifting",)), Column("steady", RECALL, ("steady",))),
        plot=_shares("rows", "forgetting time", is_ordered=True),
        statements=(
            better("Drifting: tau = 40 is better than never forgetting", "drifting", "tau_40", "never"),
            better("Drifting: tau = 40 is better than tau = 10", "drifting", "tau_40", "tau_10"),
            better("Steady: never forgetting is better than tau = 40", "steady", "never", "tau_40"),
        ),
        equal_params=(("never", "tau_160", "tau_40", "tau_10"),),
        equal_state=(("never", "tau_160", "tau_40", "tau_10"),),
    )


_SELECTIONS = (*_RULES, "oracle", "none")


def _selection() -> Claim:
    return Claim(
        letter="g",
        name="selection",
        title="Which tokens are worth keeping",
        sentence="Tokens that the past predicts badly are those worth keeping; only an oracle does better.",
        source="arXiv:2407.06324, in our words",
        recipe="selection",
        how="Eight pairs of key and value, then noise; queries come 64 tokens or more behind their values. All rules "
        "have equal bytes of state. `none` has no slots and a wider window. [Definitions](../../docs/model.md).",
        rows=_SELECTIONS,
        columns=(Column("accuracy", RECALL),),
        plot=_shares("rows", ""),
        statements=(
            *(
                _larger(f"Innovation is better than {row}", "innovation", row)
                for row in (*_RULES, "none")
                if not row.startswith("innovation")
            ),
            *(_larger(f"The oracle is better than {row}", "oracle", row) for row in (*_RULES, "none")),
        ),
        equal_params=(_SELECTIONS,),
        equal_state=(_SELECTIONS,),
    )


def _hola() -> Claim:
    return Claim(
        letter="g",
        name="hola",
        title="HOLA's order",
        sentence="A cache ruled by the correction to the state is better than one of the latest tokens, and this is "
        "better than none.",
        source="[HOLA](https://arxiv.org/abs/2607.02303), in our words",
        recipe="selection",
        how="The trials above. HOLA's score is defined on a delta rule; here is its analog on Mamba-2.",
        rows=("delta_error", "recency", "none"),
        columns=(Column("accuracy", RECALL),),
        plot=_shares("rows", ""),
        statements=(
            _larger("The correction is better than recency", "delta_error", "recency"),
            _larger("Recency is better than none", "recency", "none"),
        ),
        equal_params=(("delta_error", "recency", "none"),),
        equal_state=(("delta_error", "recency", "none"),),
    )


CLAIMS = (_recall(), _memory(), _mad(), _perplexity(), _length(), _drift(), _selection(), _hola())
