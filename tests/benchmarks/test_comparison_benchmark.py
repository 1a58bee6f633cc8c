"""The table of a comparison: differences are taken seed by seed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from benchmarks._variants import BY_POSITION, Variant, difference, ranked, table, variants_of
from benchmarks.comparison import differences_by_position, draw, main
from pipelines.engine.events import Finished
from pipelines.engine.fingerprint import digest_json
from pipelines.loading import load_pipeline
from pipelines.stages.evaluate.results import Curve, CurvePoint
from pipelines.storage import Storage, open_storage
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.api.evaluated_runs import made_record, train_output
from tests.pipelines.made_runs import made_run

VARIANTS = {
    "bmojo": Variant({0: 0.5, 1: 0.9, 2: 0.7}, 100, 10),
    "swa": Variant({0: 0.4, 1: 0.8, 2: 0.6}, 100, 10),
    "mamba2": Variant({2: 0.9, 1: 1.0, 0: 0.8}, 100, 10),
    "attention": Variant({3: 0.1}, 100, 10),
}


FOREACH = """
name: made
storage: {storage}
stages:
  tokens:
    kind: tokenize
    source: {{kind: synthetic, task: {{kind: mqar}}, num_documents: 100}}
    seq_len: 64
  train: &train
    kind: train
    needs: [tokens]
    foreach: {foreach}
    model: {{pattern: swa*1, d_model: 32, num_heads: 2, window_size: 16}}
    global_batch_size: 4
    micro_batch_size: 4
    max_steps: 2
    warmup_steps: 0
  train_longer: {{<<: *train, max_steps: 4}}
"""
MODELS = "model.d_ff: {wide: 64, wider-1: 128, late: 256}"


def names_in(markdown: str) -> list[str]:
    return [line.split("|")[1].strip() for line in markdown.splitlines()[2:]]


@pytest.fixture
def foreach(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", f"{{{MODELS}, seed: [0, 1]}}")


@pytest.fixture
def storage(tmp_path: Path, foreach: str) -> Storage:
    """Models with two seeds by two train stages, those called late not finished. valid/loss tells trainings apart."""
    storage, file = open_storage(tmp_path / "storage"), tmp_path / "made.yaml"
    file.write_text(FOREACH.format(storage=storage.url, foreach=foreach))
    config = load_pipeline(file).model_dump(mode="json")
    fingerprints = {name: digest_json(name) for name in config["stages"]}
    kinds = {name: stage["kind"] for name, stage in config["stages"].items()}
    log = made_run(storage, "made-00000000", config, kinds, fingerprints).log(2)
    for name, stage in config["stages"].items():
        if stage["kind"] != "train" or "late" in name:
            continue
        artifact = ArtifactDir(storage, f"artifacts/train/{name}")
        loss = stage["seed"] + stage["model"]["d_ff"] / 1000 + stage["max_steps"] / 10
        made_record(artifact, name, "train", fingerprints[name], stage, train_output(final_valid_loss=loss))
        log.append(Finished(stage=name, artifact=artifact.relpath))
    return storage


ONE, LONGER = {0: 0.264, 1: 1.264}, {0: 0.464, 1: 1.464}


def figures_of(variants: dict[str, Variant]) -> dict[str, dict[int, float]]:
    return {name: {seed: round(value, 6) for seed, value in one.figures.items()} for name, one in variants.items()}


@pytest.mark.parametrize(
    "foreach", [f"{{{MODELS}, seed: [0, 1]}}", f"{{seed: [0, 1], {MODELS}}}"], indirect=True, ids=["last", "first"]
)
def test_seeds_are_of_one_model_wherever_foreach_has_them(storage: Storage) -> None:
    found = figures_of(variants_of("made", storage.url, "valid/loss"))
    assert found == {"wide": ONE, "wider-1": {0: 0.328, 1: 1.328}, "late": {}}


def test_trainings_of_several_templates_are_kept_apart(storage: Storage) -> None:
    found = figures_of(variants_of("made", storage.url, "valid/loss", ["train", "train_longer"]))
    assert (found["train-wide"], found["train_longer-wide"]) == (ONE, LONGER)
    assert len(found) == 6
    assert figures_of(variants_of("made", storage.url, "valid/loss", ["train_longer"]))["wide"] == LONGER


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["made", "--baseline", "wid"], r"no model 'wid'. Did you mean 'wide'\? The models: wide, wider-1, late."),
        (["made", "--baseline", "wide", "--figure", "valid/los"], r"the figure 'valid/los'.*Known: .*valid/loss"),
        (["made", "--baseline", "wide", "--templates", "trai"], r"no train stage 'trai'.*: train, train_longer."),
        (["nosuch", "--baseline", "wide"], "There is no run 'nosuch'"),
    ],
)
def test_a_wrong_name_is_one_message_that_has_the_right_ones(
    storage: Storage, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--figure", "valid/loss", "--storage", storage.url, *arguments])
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out, printed.err.count("\n")) == (1, "", 1)
    assert re.search(message, printed.err)


def test_a_baseline_that_is_not_finished_is_no_wrong_name(
    storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has what there is. A plot would be empty."""
    command = ["made", "--baseline", "late", "--figure", "valid/loss", "--storage", storage.url]
    main(command)
    assert names_in(capsys.readouterr().out) == ["wide", "wider-1"]
    with pytest.raises(SystemExit, match="1"):
        main([*command, "--plot", str(tmp_path / "a.png")])
    assert "nothing to draw" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_what_all_seeds_share_is_not_in_the_interval() -> None:
    """The losses differ by 0.4 between seeds, but always by 0.1 between these models."""
    assert difference("swa", VARIANTS, "bmojo") == "-0.100 (-0.100 to -0.100)"
    assert difference("bmojo", VARIANTS, "bmojo") == "-"
    assert difference("attention", VARIANTS, "bmojo") == "-"  # no seed of the baseline
    assert difference("swa", VARIANTS, "not there yet") == "-"


def test_the_interval_is_students() -> None:
    """Differences 0.3, 0.1, 0.2: mean 0.2, deviation 0.1, and t = 4.303 for two degrees of freedom."""
    value, low, high = map(float, re.findall(r"[+-][\d.]+", difference("mamba2", VARIANTS, "bmojo")))
    half = 4.303 * 0.1 / 3**0.5
    assert value == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.2 - half, abs=1e-3), pytest.approx(0.2 + half, abs=1e-3))


def test_the_best_comes_first() -> None:
    assert names_in(table(VARIANTS, "bmojo", "loss")) == ["swa", "bmojo", "mamba2", "attention"]
    accuracies = {name: Variant(one.figures, better="higher") for name, one in VARIANTS.items()}
    assert ranked(accuracies) == ["mamba2", "bmojo", "swa", "attention"]


def test_a_model_that_lacks_seeds_is_below_the_complete_ones() -> None:
    """Its mean is the best, since the seed that it lacks is the hardest."""
    variants = {"few": Variant({0: 0.1, 2: 0.1}), "all": Variant({0: 0.2, 1: 0.9, 2: 0.2}), "none": Variant()}
    head, _, *rows = table(variants, "all", "loss").splitlines()
    assert "| by seed (0, 1, 2) |" in head
    assert [row.split(" | ")[2] for row in rows] == ["0.200, 0.900, 0.200", "0.100, -, 0.100"]
    assert names_in("\n".join(["", "", *rows])) == ["all", "few"]


def test_curves_are_compared_seed_by_seed_in_nats() -> None:
    def variant(nats: dict[int, tuple[float, float]]) -> Variant:
        curves = {
            seed: Curve(
                name=BY_POSITION, title="", x_label="", y_label="",
                points=tuple(CurvePoint(x=64 * n, y=math.exp(loss)) for n, loss in enumerate(losses, 1)),
            )
            for seed, losses in nats.items()
        }  # fmt: skip
        return Variant({seed: 1.0 for seed in nats}, curves=curves)

    variants = {
        "a": variant({0: (3.0, 2.0), 1: (4.0, 3.0), 2: (9.0, 9.0)}),
        "b": variant({0: (3.1, 2.4), 1: (4.3, 3.4)}),
    }
    found = differences_by_position("b", variants, "a")
    assert found == [(64, pytest.approx(0.2)), (128, pytest.approx(0.4))]
    assert len(draw(variants, "a", "loss").axes) == 2
    assert len(draw(VARIANTS, "bmojo", "loss").axes) == 1
