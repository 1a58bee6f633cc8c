"""The claims' page: which trials decide, by which rule, and that nothing is claimed of what did not run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from base.errors import UserError
from benchmarks.reproduce import __main__ as command
from benchmarks.reproduce import explanations, figures, page
from benchmarks.reproduce.__main__ import rounds
from benchmarks.reproduce.claims import CLAIMS, RECALL, Claim
from benchmarks.reproduce.figures import by_half_octave
from benchmarks.reproduce.recipes import FOLDER, RECIPES, Scale, Setting, recipe_file
from benchmarks.reproduce.statements import Side, Statement, Verdict, joined, read, verdict_of
from benchmarks.reproduce.trials import Finished, Trial, by_name, trials_of
from bmojo.counting import ModelCounts
from data.tasks.task import TaskSequence
from pipelines.loading import load_pipeline
from pipelines.stages.evaluate.results import CurvePoint
from pipelines.stages.report.drawing import new_figure
from pipelines.stages.uncertainty import Estimate

ROOT = Path(__file__).parents[2]
COUNTS = ModelCounts(1000, 500, 1e3, 4000)


def trial(name: str, seed: int, value: float | None, counts: ModelCounts = COUNTS, figure: str = RECALL) -> Trial:
    finished = None if value is None else Finished({figure: value}, {}, 40.0, 60.0, frozenset({"abcdef0"}))
    return Trial(tuple(name.split("/")), str(seed), counts, 1000, finished)


def trials(**values: list[float | None]) -> dict[tuple[str, ...], list[Trial]]:
    return by_name(trial(name, seed, value) for name, of in values.items() for seed, value in enumerate(of))


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trial]]:
    """All trials, none of them finished."""
    setting = Setting(Scale.CPU, str(tmp_path_factory.mktemp("storage")))
    return {recipe: trials_of(recipe, setting) for recipe in RECIPES}


RECALL_BY_SLOTS = {"0": 0.1, "2": 0.2, "4": 0.3, "8": 0.4, "16": 0.8, "32": 0.9, "64": 0.9}


def finished_memory(recipes: dict[str, list[Trial]], extra: float = 0.0) -> dict[str, list[Trial]]:
    """The trials of the number of slots are finished: slots help until there are 32."""
    memory = [
        Trial(one.name, one.seed, one.counts, one.num_tokens,
              trial("x", 0, RECALL_BY_SLOTS[one.name[0]] + 0.01 * int(one.seed) + extra).finished)
        for one in recipes["memory"]
    ]  # fmt: skip
    return {**recipes, "memory": memory}


def larger(left: str, right: str, above: float = 0.0) -> Statement:
    return Statement("", Side(RECALL, ((left,),)), Side(RECALL, ((right,),)), above)


def test_what_all_seeds_share_is_not_in_the_interval() -> None:
    """Accuracies differ by 0.4 between seeds, but always by 0.1 between the two. A seed of one alone does not count."""
    found = read(larger("a", "b"), trials(a=[0.5, 0.9, 0.7, 0.1], b=[0.4, 0.8, 0.6, None]))
    assert found.num_seeds == 3
    assert found.difference == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
    assert found.verdict is Verdict.HELD


def test_a_mean_on_the_right_side_is_not_enough() -> None:
    """Differences 0.3, 0.1, -0.1: mean 0.1, deviation 0.2 and t = 4.303 give +-0.497."""
    found = read(larger("a", "b"), trials(a=[0.8, 0.6, 0.4], b=[0.5, 0.5, 0.5]))
    assert found.difference is not None
    assert found.difference.low == pytest.approx(0.1 - 0.497, abs=1e-3)
    assert found.verdict is Verdict.UNDECIDED
    assert read(larger("a", "b"), trials(a=[0.8], b=[0.5])).verdict is Verdict.UNDECIDED
    assert read(larger("a", "c"), trials(a=[0.8], b=[0.5])).verdict is Verdict.UNKNOWN


@given(value=st.floats(-1, 1), half=st.floats(0, 1), above=st.floats(-1, 1))
def test_swapping_the_sides_swaps_the_verdict(value: float, half: float, above: float) -> None:
    verdict = verdict_of(Estimate(value, value - half, value + half), above)
    mirrored = verdict_of(Estimate(-value, -value - half, -value + half), -above)
    assert mirrored is {Verdict.HELD: Verdict.FAILED, Verdict.FAILED: Verdict.HELD}.get(verdict, verdict)


def test_a_side_of_several_names_counts_only_seeds_that_all_have() -> None:
    side = Side(RECALL, (("x", "a"), ("y", "a")))
    every = [trial("x/a", 0, 0.2), trial("x/a", 1, 0.4), trial("y/a", 0, 0.6), trial("y/a", 1, None)]
    assert side.by_seed(by_name(every)) == {"0": pytest.approx(0.4)}


def test_a_claim_holds_if_all_statements_do() -> None:
    held, failed, undecided, unknown = Verdict.HELD, Verdict.FAILED, Verdict.UNDECIDED, Verdict.UNKNOWN
    assert joined([held, held]) is held
    assert joined([held, undecided]) is undecided
    assert joined([undecided, failed, held]) is failed
    assert joined([held, unknown]) is unknown


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_claims_are_about_trials_that_their_recipe_has(claim: Claim, recipes: dict[str, list[Trial]]) -> None:
    """And models that a claim calls equal are."""
    found = by_name(recipes[claim.recipe])
    assert set(claim.trials()) <= set(found)
    sides = [side for statement in claim.statements for side in (statement.left, statement.right)]
    assert {name for side in sides for name in side.names} <= set(claim.trials())
    page.check_equal(claim, found)


def test_larger_models_of_text_are_equal_too(tmp_path: Path) -> None:
    found = by_name(trials_of("text", Setting(Scale.GPU, str(tmp_path))))
    assert {trial.counts.num_params > 10_000_000 for same in found.values() for trial in same} == {True}
    for claim in CLAIMS:
        if claim.recipe == "text":
            page.check_equal(claim, found)


def test_every_recipe_is_run_and_every_trial_is_in_a_table(recipes: dict[str, list[Trial]]) -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(RECIPES)
    for recipe, of in recipes.items():
        shown = {name for claim in CLAIMS if claim.recipe == recipe for name in claim.trials()}
        assert shown == {one.name for one in of}
        assert all(len(same) >= 3 for same in by_name(of).values())
    assert all(len(same) == 5 for same in by_name(recipes["selection"]).values())


@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_scale_is_made_of_valid_overrides(recipe: str, scale: Scale, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    setting = Setting(scale, "elsewhere", (str(tmp_path / "a.txt"),), num_cpus=3)
    found = load_pipeline(recipe_file(recipe), setting.overrides(recipe))
    assert found.storage == "elsewhere"
    assert found.cluster.num_cpus == 3
    trainings = [stage for stage in found.stages.values() if stage.kind == "train"]
    steps = yaml.safe_load(recipe_file(recipe).read_text())["stages"]["train"]["max_steps"]
    assert {stage.max_steps for stage in trainings} == {{Scale.QUICK: 2, Scale.CPU: steps, Scale.GPU: 4 * steps}[scale]}
    assert all(bool(stage.resources.gpus_per_worker) == (scale is Scale.GPU) for stage in trainings)
    if recipe == "text":
        assert found.stages["tokens"].source.paths == (str(tmp_path / "a.txt"),)


def test_all_recipes_have_a_seed_before_one_has_two() -> None:
    assert list(rounds(["memory", "selection"], most=9)) == [
        *[("memory", 1), ("selection", 1), ("memory", 2), ("selection", 2), ("memory", 3), ("selection", 3)],
        *[("selection", 4), ("selection", 5)],
    ]
    found = load_pipeline(recipe_file("selection"), Setting(Scale.CPU, "runs").overrides("selection", 2))
    assert {stage.seed for stage in found.stages.values() if stage.kind == "train"} == {0, 1}


def test_the_page_says_what_is_not_finished(recipes: dict[str, list[Trial]], tmp_path: Path) -> None:
    (tmp_path / "memory.png").write_bytes(b"of figures that no longer count")
    page.write(recipes, Setting(Scale.CPU, "runs"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "held**" not in text
    assert len(re.findall(r"^Outcome: not run", text, re.M)) == len(CLAIMS)
    assert not list(tmp_path.glob("*.png"))


def test_the_page_decides_a_finished_claim_and_no_other(recipes: dict[str, list[Trial]], tmp_path: Path) -> None:
    """Slots help until there are 32. One training of the selection rules is missing."""
    rest = [
        Trial(one.name, one.seed, one.counts, one.num_tokens, trial("x", 0, 0.5).finished if number else None)
        for number, one in enumerate(recipes["selection"])
    ]
    page.write({**finished_memory(recipes), "selection": rest}, Setting(Scale.CPU, "runs"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert re.search(r"More eidetic memory, more recall.* \| \*\*held\*\* \| 21 of 21 \|", text)
    assert re.search(r"Which tokens are worth keeping.* \| open \| 49 of 50 \|", text)
    assert re.search(r"\| 16 slots recall more than 8 \| \+0\.40* .*\| 3 \| held \|", text)
    assert {file.stem for file in tmp_path.glob("*.png")} == {"memory", "selection", "hola"}


PLAIN = Setting(Scale.CPU, "runs")


def test_finished_trials_are_not_replaced_by_fewer(recipes: dict[str, list[Trial]], tmp_path: Path) -> None:
    page.write(finished_memory(recipes), PLAIN, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"README.md", "memory.png"}
    with pytest.raises(UserError, match="has 21 finished trials of claim memory; the storage has 0"):
        page.write(recipes, PLAIN, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    page.write(finished_memory(recipes, 0.05), PLAIN, tmp_path)  # as many


def test_another_page_is_not_replaced(recipes: dict[str, list[Trial]], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="no page of this command"):
        page.write(recipes, PLAIN, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_links_lead_to_this_repository_from_any_folder(recipes: dict[str, list[Trial]], tmp_path: Path) -> None:
    text = page.write(recipes, PLAIN, tmp_path / "deep" / "page").read_text()
    links = re.findall(r"\]\((\.\.[^)]+)\)", text)
    assert len(links) > len(CLAIMS)
    assert all((tmp_path / "deep" / "page" / link).is_file() for link in links)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One note, on the number of slots."""
    folder = tmp_path / "notes"
    folder.mkdir()
    monkeypatch.setattr(explanations, "NOTES", folder)
    (folder / "memory.md").write_text("Slots are worth it.\n")
    return folder


def test_a_note_stands_below_the_figures_that_it_was_written_for(
    recipes: dict[str, list[Trial]], notes: Path, tmp_path: Path
) -> None:
    finished, changed = finished_memory(recipes), finished_memory(recipes, 0.02)

    def written(recipes: dict[str, list[Trial]], setting: Setting = PLAIN) -> str:
        (tmp_path / "README.md").unlink(missing_ok=True)
        return page.write(recipes, setting, tmp_path).read_text()

    left_out = re.compile(r"explanation\s+in\s+\[notes/memory.md\].*\s+is\s+left\s+out")
    assert left_out.search(written(finished)), "nobody said which figures it is about"
    explanations.confirm("memory", page.digests(finished, PLAIN)["memory"])
    assert "Slots are worth it." in written(finished)
    assert not left_out.search(written(finished))
    assert left_out.search(written(changed))
    assert "Slots are worth it." not in written(changed)
    for other in (Setting(Scale.GPU, "runs"), Setting(Scale.QUICK, "runs"), Setting(Scale.CPU, "runs", ("a.txt",))):
        text = written(finished, other)
        assert "Slots are worth it." not in text
        assert not left_out.search(text)
    unfinished = {**finished, "memory": [*finished["memory"][:-1], recipes["memory"][-1]]}
    assert "Slots are worth it." not in written(unfinished)
    explanations.confirm("memory", page.digests(changed, PLAIN)["memory"])
    assert (notes / "memory.md").read_text().count("figures:") == 1
    assert "Slots are worth it." in written(changed)


@pytest.fixture
def storage(tmp_path: Path, recipes: dict[str, list[Trial]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of the command, whose trials of the number of slots are finished. A training would fail."""
    monkeypatch.setattr(command, "_trials", lambda setting: finished_memory(recipes))
    monkeypatch.setattr(command, "_run", lambda recipe, seeds, setting: pytest.fail("a recipe was run"))
    (tmp_path / "storage" / "artifacts" / "train").mkdir(parents=True)
    return tmp_path / "storage"


def test_the_page_is_beside_the_trials(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And never in the repository, unless that is asked for."""
    committed = {file: file.stat().st_mtime_ns for file in page.COMMITTED.glob("*.*")}
    assert command.main(["--page-only", "--storage", str(storage)]) == 0
    assert f"Page: {storage}/reproduce/README.md" in capsys.readouterr().out
    assert "`make reproduce`" in (storage / "reproduce" / "README.md").read_text()
    assert command.main(["--page-only", "--storage", str(storage), "--corpus", "a.txt"]) == 0
    assert (storage / "reproduce-corpus" / "README.md").exists()
    assert {file: file.stat().st_mtime_ns for file in page.COMMITTED.glob("*.*")} == committed


def test_the_page_is_written_after_each_recipe_and_a_failure_is_told(
    storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of three recipes fails."""
    file, seen = storage / "reproduce" / "README.md", []

    def run(recipe: str, seeds: int, setting: Setting) -> int:
        seen.append((recipe, file.exists()))
        file.unlink()
        return 75 if recipe == "drift" else 0

    monkeypatch.setattr(command, "_run", run)
    arguments = ["--only", "memory", "drift", "text", "--seeds", "1", "--storage", str(storage)]
    assert command.main(arguments) == 75
    assert seen == [("memory", True), ("drift", True), ("text", True)]
    assert file.exists()
    assert capsys.readouterr().out.endswith(f"Page: {file}\n")


def test_a_note_is_confirmed_by_the_command(storage: Path, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--storage", str(storage)]
    assert command.main(["--page-only", *at]) == 0
    assert "The note on memory is about other figures" in capsys.readouterr().out
    assert command.main(["--confirm-notes", "memory", *at]) == 0
    assert "about other figures" not in capsys.readouterr().out
    assert "Slots are worth it." in (storage / "reproduce" / "README.md").read_text()
    assert command.main(["--confirm-notes", "memory", "recall", *at]) == 1
    assert "--confirm-notes recall: a note is on all trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--page-only", "--storage", "nosuch"], "--storage nosuch: nothing is finished there"),
        (["--storage", "memory://bucket/prefix"], "the page needs a local folder. Name one with --page"),
    ],
)
def test_what_has_no_page_is_one_message(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err
    assert [file.name for file in tmp_path.iterdir()] == ["storage"]


def test_no_seed_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--seeds", "0"])
    assert "expected a number of at least 1" in capsys.readouterr().err


def test_a_wrong_corpus_stops_before_the_first_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RECIPES", ("text",))
    monkeypatch.setattr(command, "_run", lambda recipe, seeds, setting: pytest.fail("a recipe was run"))
    assert command.main(["--only", "text", "--corpus", "nope.txt", "--storage", str(tmp_path / "storage")]) == 1
    assert "there is no file nope.txt" in capsys.readouterr().err


def drawn(recipe: str, stage: str, number: int) -> Iterator[TaskSequence]:
    source = load_pipeline(recipe_file(recipe)).stages[stage].source
    rng = np.random.default_rng(0)
    return (source.task.draw(rng) for _ in range(number))


def test_the_page_tells_lengths_as_they_are_drawn() -> None:
    how = {claim.name: claim.how for claim in CLAIMS}
    tasks = [name for name in load_pipeline(recipe_file("mad")).stages if name.startswith("tokens-")]
    numbers = {task: 16000 if task == "tokens-fuzzy" else 10 for task in tasks}  # the others do not vary
    lengths = {task: [len(one.tokens) for one in drawn("mad", task, number)] for task, number in numbers.items()}
    fuzzy = lengths.pop("tokens-fuzzy")
    others = [length for found in lengths.values() for length in found]
    assert f"of {min(others)} to {max(others)} tokens, in fuzzy recall of {min(fuzzy)} to {max(fuzzy)}" in how["mad"]
    later: set[int] = set()  # than its value a key is asked for, a token before the answer
    for one in drawn("drift", "tokens-steady", 1000):
        answers = np.flatnonzero(one.is_answer)
        later.update((answers - 1 - one.source[answers]).tolist())
    assert f"asked for {min(later)} to {max(later)} tokens later" in how["drift"]


def test_plots_of_shares_are_cut_at_none_and_all(
    recipes: dict[str, list[Trial]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds of 0 and 1 have an interval far beyond both."""
    kept: list[Axes] = []

    @contextmanager
    def spied(height: float) -> Iterator[tuple[Figure, Axes]]:
        with new_figure(height) as (figure, axes):
            kept.append(axes)
            yield figure, axes

    monkeypatch.setattr(figures, "new_figure", spied)
    claim = next(claim for claim in CLAIMS if claim.name == "memory")
    found = by_name(trial("8", seed, float(seed)) for seed in range(2))
    assert figures.draw(claim, found, tmp_path / "a.png")
    assert max(line.get_ydata().max() for line in kept[0].lines) > 2
    low, high = kept[0].get_ylim()
    assert -0.1 < low < 0
    assert 1 < high < 1.1


def test_a_curve_has_two_points_per_doubling_and_ends_where_training_did() -> None:
    """Of 128 equal steps half would crowd the last octave of a logarithmic axis."""
    curve = [CurvePoint(x=x, y=float(x)) for x in range(32, 4097, 32)]
    means = by_half_octave(curve)
    assert list(means) == [32, 64, 128, 160, 256, 352, 512, 704, 1024, 1440, 2048, 2880, 4096]
    assert means[256] == pytest.approx((192 * 224 * 256) ** (1 / 3))


def test_what_is_missing_is_estimated_from_what_is_finished() -> None:
    """40 s of steps and 20 s beside them each; FLOPs are 3e3 per token, of 1000 tokens."""
    found = page.pace_of([trial("a", 0, 0.5), trial("b", 0, 0.5), trial("c", 0, None)])
    assert found == page.Pace(2 * 3e6 / 80, 20.0)
    assert page.pace_of([trial("a", 0, None)]) is None


def test_unequal_models_make_no_page(recipes: dict[str, list[Trial]], tmp_path: Path) -> None:
    larger_one = ModelCounts(COUNTS.num_params, 0, 1e3, round(COUNTS.state_bytes * 1.03))
    changed = [
        trial("/".join(one.name), int(one.seed), None, larger_one if one.name == ("oracle",) else COUNTS)
        for one in recipes["selection"]
    ]
    recipes = finished_memory(recipes)
    with pytest.raises(ValueError, match="claim selection: state_bytes should be equal to 2 %"):
        page.write({**recipes, "selection": changed}, Setting(Scale.CPU, "runs"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_reproduction_goes_on(tmp_path: Path) -> None:
    """SIGKILL of all its processes once a trial is finished; the same command runs the rest, and writes the page."""
    again = [sys.executable, "-m", "benchmarks.reproduce", "--quick", "--only", "memory", "--storage", str(tmp_path)]
    first = subprocess.Popen(again, cwd=ROOT, start_new_session=True)
    records = tmp_path / "artifacts" / "train"
    while not list(records.glob("*/record.json")):
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {file: file.stat().st_mtime_ns for file in records.glob("*/record.json")}
    assert len(before) < 4
    assert subprocess.run(again, cwd=ROOT, check=False).returncode == 0
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())
    text = (tmp_path / "reproduce" / "README.md").read_text()
    assert re.search(r"More eidetic memory.* \| 4 of 4 \|", text)
