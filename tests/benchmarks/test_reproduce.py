"""The claims' page: which trials decide, by which rule, and that nothing is claimed of what did not run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.reproduce import page
from benchmarks.reproduce.__main__ import rounds
from benchmarks.reproduce.claims import CLAIMS, RECALL, Claim
from benchmarks.reproduce.figures import by_half_octave
from benchmarks.reproduce.recipes import FOLDER, RECIPES, Scale, Setting, recipe_file
from benchmarks.reproduce.statements import Side, Statement, Verdict, joined, read, verdict_of
from benchmarks.reproduce.trials import Finished, Trial, by_name, trials_of
from bmojo.counting import ModelCounts
from pipelines.loading import load_pipeline
from pipelines.stages.evaluate.results import CurvePoint
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
    recall = {"0": 0.1, "2": 0.2, "4": 0.3, "8": 0.4, "16": 0.8, "32": 0.9, "64": 0.9}
    memory = [
        Trial(one.name, one.seed, one.counts, one.num_tokens,
              trial("x", 0, recall[one.name[0]] + 0.01 * int(one.seed)).finished)
        for one in recipes["memory"]
    ]  # fmt: skip
    rest = [
        Trial(one.name, one.seed, one.counts, one.num_tokens, trial("x", 0, 0.5).finished if number else None)
        for number, one in enumerate(recipes["selection"])
    ]
    page.write({**recipes, "memory": memory, "selection": rest}, Setting(Scale.CPU, "runs"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert re.search(r"More eidetic memory, more recall.* \| \*\*held\*\* \| 21 of 21 \|", text)
    assert re.search(r"Which tokens are worth keeping.* \| open \| 49 of 50 \|", text)
    assert re.search(r"\| 16 slots recall more than 8 \| \+0\.40* .*\| 3 \| held \|", text)
    assert {file.stem for file in tmp_path.glob("*.png")} == {"memory", "selection", "hola"}


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
    with pytest.raises(ValueError, match="claim selection: state_bytes should be equal to 2 %"):
        page.write({**recipes, "selection": changed}, Setting(Scale.CPU, "runs"), tmp_path)


@pytest.mark.slow
def test_a_killed_reproduction_goes_on(tmp_path: Path) -> None:
    """SIGKILL of all its processes once a trial is finished; the same command runs the rest, and writes the page."""
    command = [sys.executable, "-m", "benchmarks.reproduce", "--quick", "--only", "memory", "--storage", str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    records = tmp_path / "artifacts" / "train"
    while not list(records.glob("*/record.json")):
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {file: file.stat().st_mtime_ns for file in records.glob("*/record.json")}
    assert len(before) < 4
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())
    text = (tmp_path / "reproduce" / "README.md").read_text()
    assert re.search(r"More eidetic memory.* \| 4 of 4 \|", text)
