"""Which paths of a pipeline a cluster can see, and what is said of those that it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.loading import load_pipeline
from pipelines.submit.paths import Inputs, find_inputs, find_storage

PIPELINE = """\
name: shipped
stages:
  tokenizer: {{kind: tokenizer, source: {{kind: files, paths: ["{path}"]}}, vocab_size: 512}}
  work: {{kind: python, call: "mine:work"}}
"""


def inputs_of(folder: Path, path: str, is_here: bool = False) -> Inputs:
    (folder / "p").mkdir(exist_ok=True)
    (folder / "p/p.yaml").write_text(PIPELINE.format(path=path))
    (folder / "p/mine.py").write_text("import helper\n\n\ndef work(stage): ...\n")
    (folder / "p/helper.py").touch()
    return find_inputs(load_pipeline(folder / "p/p.yaml").graph(), is_here)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text("text")
    return tmp_path


@pytest.mark.parametrize("path", ["texts/*.txt", "./p/../texts/[ab].txt"])
def test_relative_paths_and_code_are_shipped(here: Path, path: str) -> None:
    found = inputs_of(here, path)
    assert {file.relative_to(here).as_posix() for file in found.shipped} == {
        "texts/a.txt", "texts/b.txt", "p/mine.py", "p/helper.py",
    }  # fmt: skip
    assert found.notes == ()


def test_an_absolute_path_is_for_the_cluster_to_see(here: Path) -> None:
    found = inputs_of(here, f"{here}/texts/a.txt")
    assert [file.name for file in found.shipped] == ["helper.py", "mine.py"]
    assert found.notes == (
        f"stage tokenizer: {here}/texts/a.txt is an absolute path. All machines of the cluster must see it there; a "
        "relative path would be shipped.",
    )
    assert inputs_of(here, "/only/on/the/cluster.txt").notes
    assert not inputs_of(here, f"{here}/texts/a.txt", is_here=True).notes


def test_a_relative_path_without_a_file_is_an_error_before_anything_is_shipped(here: Path) -> None:
    with pytest.raises(UserError, match=r"stage tokenizer: there is no file texts/\*.jsonl \(from "):
        inputs_of(here, "texts/*.jsonl")


@pytest.mark.parametrize("storage", ["runs", "./runs", "file://runs"])
def test_a_relative_storage_is_refused_for_a_cluster_elsewhere(here: Path, storage: str) -> None:
    with pytest.raises(UserError, match=r"is a relative path, and the cluster is not on this machine.*s3://"):
        find_storage(storage, is_here=False)


def test_storages_as_a_job_names_them(here: Path) -> None:
    assert find_storage("runs", is_here=True) == (f"{here}/runs", None)
    assert find_storage("s3://bucket/prefix", is_here=False) == ("s3://bucket/prefix", None)
    storage, note = find_storage("/shared/runs", is_here=False)
    assert storage == "/shared/runs"
    assert note is not None
    assert "all machines of the cluster must share that folder" in note
