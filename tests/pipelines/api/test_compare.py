"""`bmojo compare` and `bmojo open`: pages about runs of any storage, and what they refuse."""

from __future__ import annotations

import json
import re
import webbrowser
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from base.errors import UserError
from pipelines import api
from pipelines.api.comparison import run_labels
from pipelines.cli.app import app
from pipelines.engine.events import Finished, Status
from pipelines.engine.runs import Run
from pipelines.storage import Storage, open_storage
from pipelines.storage.artifact import ArtifactDir
from tests.pipelines.api.evaluated_runs import evaluated_run
from tests.pipelines.made_runs import made_run


class Pair(NamedTuple):
    storage: Storage
    one: Run
    two: Run


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    storage = open_storage(tmp_path / "runs")
    one = evaluated_run(storage, "one-00000001", 3.0, overrides=("train.lr=1e-3",))
    return Pair(storage, one, evaluated_run(storage, "two-00000002", 3.5, lr=2e-3))


def bmojo(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_runs_are_compared_by_the_names_of_their_pipelines(pair: Pair) -> None:
    report = api.compare([pair.one, pair.two])
    one, two = report.rows
    assert (one["model"], two["model"]) == ("one", "two")
    assert (one["value"], two["value"], two["delta"]) == pytest.approx((3.0, 3.5, 0.5))
    assert (two["delta_low"], two["delta_high"]) == pytest.approx((0.5, 0.5))  # harder by as much in each document
    assert one["low"] < 2.9
    page = report.markdown
    assert "# Evaluations of one, two" in page
    assert "| one | bmojo*2 | 4.20 M |" in page
    assert re.search(r"\| model \| lr \|.*\n.*\n\| one \| 0\.001 \|\n\| two \| 0\.002 \|", page)  # settings that differ
    assert "- command: bmojo run made.yaml train.lr=1e-3" in page
    assert f"- commit: {'c' * 40} with local changes" in page
    assert "| one/train | train | 2026-01-02 03:04 UTC | 1 min 15 s | cccccccccc | a CPU |" in page
    assert page.count("Versions: torch 2.9.") == 1
    assert page.count("| validation | 31 | 1,200 | 4,800 | 4.000 | 20 | 1 | 0.00% |") == 1  # both read the same tokens
    assert "| near_duplicate | 6 | 1.76% |" in page
    assert "Only 31 documents for validation" in page


@pytest.mark.ci
def test_runs_with_other_validation_splits_are_shown_but_not_paired(pair: Pair) -> None:
    other = evaluated_run(pair.storage, "other-00000003", 3.2, split="another", lr=3e-3)
    report = api.compare([pair.one, other])
    assert [row["delta"] for row in report.rows] == [None, None]
    assert report.verdicts[-1] == (
        "loss: other: measured on other documents than one (another validation split, or other examples), so the two "
        "are not compared."
    )
    assert report.verdicts[-1] in report.markdown


def test_seeds_of_two_runs_are_replicates(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "runs")
    runs = [evaluated_run(storage, f"seeds-0000000{seed}", 3.0 + seed, seed=seed) for seed in range(2)]
    report = api.compare(runs)
    assert {(row["model"], row["seeds"]) for row in report.rows} == {("seeds", 2)}
    loss = next(row for row in report.rows if row["figure"] == "loss")
    assert loss["value"] == pytest.approx(3.5)
    assert loss["low"] == pytest.approx(3.5 - 12.7062 * 0.5, rel=1e-4)


def test_runs_of_two_storages_with_one_id_go_by_their_folders(pair: Pair, tmp_path: Path) -> None:
    other = evaluated_run(open_storage(tmp_path / "other"), "one-00000001", 4.0)
    assert run_labels([pair.one, other]) == [pair.one.url, other.url]
    assert run_labels([pair.one, pair.two]) == ["one", "two"]
    assert run_labels([pair.one]) == [""]
    with pytest.raises(UserError, match=r"one-00000001 is named twice"):
        run_labels([pair.one, pair.one])


def test_a_run_of_another_storage_is_named_by_its_folder(pair: Pair, tmp_path: Path) -> None:
    assert api.find_run_anywhere(open_storage(tmp_path), f"{pair.two.url}/").url == pair.two.url
    assert api.find_run_anywhere(pair.storage, "two").run_id == "two-00000002"
    with pytest.raises(UserError, match=r"'a/b' is not the folder of a run. Expected STORAGE/runs/RUN"):
        api.find_run_anywhere(pair.storage, "a/b")


def test_what_cannot_be_compared_says_why(pair: Pair) -> None:
    running = evaluated_run(pair.storage, "three-00000003", 3.0, finished=False, lr=3e-3)
    with pytest.raises(UserError, match=r"Run three-00000003 has no finished evaluation: evaluate is"):
        api.compare([pair.one, running])
    with pytest.raises(UserError, match=r"no finished evaluation 'evaluat', nor .* Did you mean 'evaluate'"):
        api.compare([pair.one], stages=["evaluat"])
    with pytest.raises(UserError, match=r"no model 'three' to be the baseline. Models: one, two\."):
        api.compare([pair.one, pair.two], baseline="three")
    assert {row["model"] for row in api.compare([pair.one], stages=["train"]).rows} == {"train"}


def test_the_command_prints_the_table_and_writes_the_page(pair: Pair, tmp_path: Path) -> None:
    page = tmp_path / "page"
    code, said = bmojo(
        "compare", "one", pair.two.url, "--storage", pair.storage.url, "--baseline", "two", "-o", str(page)
    )
    assert code == 0
    assert "one" in said
    assert "3.5" in said
    assert "loss: one is best. The 95 % interval of its difference to each other model excludes 0" in said
    assert f"Wrote {page}/report.html." in said
    assert json.loads((page / "report.json").read_text())["baseline"] == "two"
    assert (page / "plots" / "text-loss.svg").exists()
    code, said = bmojo("compare", "one", "--storage", pair.storage.url, "-o", str(tmp_path / "one.html"))
    assert code == 0
    assert (tmp_path / "one.html").read_text().startswith("<!doctype html>")
    code, said = bmojo("compare", "one", "--json", "--storage", pair.storage.url, "-o", str(tmp_path / "one.html"))
    assert json.loads(said)["runs"][0]["run_id"] == "one-00000001"
    with pytest.raises(UserError, match="Name a folder that can be written with --output"):
        bmojo("compare", "one", "--storage", pair.storage.url, "-o", str(tmp_path / "one.html" / "x"))


def reported_run(storage: Storage, status: Status = Status.SUCCEEDED) -> Run:
    kinds = {"report": "report", "other": "train"}
    run = made_run(storage, "paged-00000004", {}, kinds)
    artifact = ArtifactDir(storage, "artifacts/report/report-ffffffff")
    (artifact.local / "report.html").write_text("<!doctype html>here")
    artifact.publish("report.html")
    if status is Status.SUCCEEDED:
        run.log(2).append(Finished(stage="report", artifact=artifact.relpath))
    return run


def test_open_prints_where_the_report_is_and_shows_it_if_there_is_a_display(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    storage = open_storage(tmp_path / "runs")
    reported_run(storage)
    file = tmp_path / "runs/artifacts/report/report-ffffffff/report.html"
    assert bmojo("open", "paged", "--storage", storage.url) == (0, f"{file}\n")
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    bmojo("open", "paged", "report", "--storage", storage.url)
    assert opened == [file.as_uri()]
    with pytest.raises(UserError, match=r"Stage other of run paged-00000004 is no report. Reports: report\."):
        bmojo("open", "paged", "other", "--storage", storage.url)


def test_open_without_a_report_names_what_makes_one(pair: Pair) -> None:
    with pytest.raises(UserError, match=r"it has no report stage. For a page about its evaluations: bmojo compare one"):
        bmojo("open", "one", "--storage", pair.storage.url)


def test_open_fetches_the_page_from_an_object_store(s3_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cli.reports._has_display", lambda: False)
    reported_run(s3_storage)
    code, said = bmojo("open", "paged", "--storage", s3_storage.url)
    assert code == 0
    assert Path(said.strip()).read_text() == "<!doctype html>here"
