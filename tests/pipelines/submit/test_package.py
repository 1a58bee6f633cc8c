"""What is shipped with a submitted pipeline, and what stays here."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.submit import package
from pipelines.submit.environment import FILE
from pipelines.submit.package import Contents, choose_files, write_package


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def chosen(folder: Path, *needed: str, storage: Path | None = None) -> set[str]:
    contents = choose_files(folder, [folder / name for name in needed], storage)
    return {path.relative_to(folder).as_posix() for path in contents.files}


def names_in(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return set(opened.namelist())


def test_hidden_files_caches_environments_data_and_runs_stay_here(tmp_path: Path) -> None:
    make_files(tmp_path, "p.yaml", "code/a.py", "code/data/x.txt", ".env", ".git/config", "code/.ssh/id",
               "data/big.txt", "runs/x/y", "code/__pycache__/a.pyc", "env/pyvenv.cfg", "env/lib/a.py")  # fmt: skip
    assert chosen(tmp_path) == {"p.yaml", "code/a.py", "code/data/x.txt"}
    assert choose_files(tmp_path, [], None).left_out == ("data/", "runs/")


def test_what_the_pipeline_names_is_shipped_from_wherever_it_is(tmp_path: Path) -> None:
    make_files(tmp_path, "p/p.yaml", "p/data/corpus.txt", "p/data/other.txt", "beside/corpus.txt")
    contents = choose_files(tmp_path / "p", [tmp_path / "p/data/corpus.txt", tmp_path / "beside/corpus.txt"], None)
    shipped = {path.relative_to(tmp_path).as_posix() for path in contents.files}
    assert shipped == {"p/p.yaml", "p/data/corpus.txt", "beside/corpus.txt"}


def test_the_storage_stays_here_whatever_its_name(tmp_path: Path) -> None:
    make_files(tmp_path, "p.yaml", "results/artifacts/x")
    assert chosen(tmp_path, storage=tmp_path / "results") == {"p.yaml"}


def test_big_files_stay_here_unless_the_pipeline_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "BIG_BYTES", 4)
    make_files(tmp_path, "p.y", "corpus.txt", "model.bin")
    assert chosen(tmp_path, "corpus.txt") == {"p.y", "corpus.txt"}
    assert choose_files(tmp_path, [], None).left_out == ("corpus.txt (0.0 MB)", "model.bin (0.0 MB)")


def test_a_folder_with_very_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_FILES", 2)
    make_files(tmp_path, "a", "b", "c")
    with pytest.raises(UserError, match=r"more than 2 files would be shipped.*--working-dir"):
        choose_files(tmp_path, [], None)


def test_what_is_too_large_for_ray_is_refused_with_the_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "_own_files", lambda: iter(()))
    monkeypatch.setattr(package, "MAX_BYTES", 2**20)
    files = []
    for name, size in (("small.bin", 1000), ("large.bin", 2**20), ("middle.bin", 2**19)):
        (tmp_path / name).write_bytes(random.Random(0).randbytes(size))
        files.append(tmp_path / name)
    with pytest.raises(
        UserError, match=r"more than the 1 MiB .*largest: \S*large.bin \(1.0 MB\), \S*middle.bin"
    ) as found:
        write_package(tmp_path / "package.zip", Contents(tuple(files), ()), tmp_path, None)
    assert "--working-dir" in str(found.value)


def test_our_packages_and_presets_lie_above_the_users_files(tmp_path: Path) -> None:
    make_files(tmp_path, "data/__init__.py", "p.yaml")  # would hide our package, were they side by side
    contents = Contents((tmp_path / "data/__init__.py", tmp_path / "p.yaml"), ())
    write_package(tmp_path / "package.zip", contents, tmp_path, None)
    names = names_in(tmp_path / "package.zip")
    assert {"job/p.yaml", "job/data/__init__.py", "pipelines/__main__.py", "data/__init__.py"} <= names
    assert "configs/models/bmojo-130m.yaml" in names
    assert FILE not in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]


def test_variables_are_in_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    write_package(tmp_path / "package.zip", Contents((), ()), tmp_path, b"{}")
    with zipfile.ZipFile(tmp_path / "package.zip") as opened:
        assert opened.getinfo(FILE).external_attr >> 16 == 0o100600


def test_the_same_files_are_the_same_archive_and_programs_stay_programs(tmp_path: Path) -> None:
    make_files(tmp_path, "run.sh", "p.yaml")
    os.chmod(tmp_path / "run.sh", 0o700)
    contents = Contents((tmp_path / "run.sh", tmp_path / "p.yaml"), ())
    write_package(tmp_path / "1.zip", contents, tmp_path, None)
    os.utime(tmp_path / "p.yaml", (1, 1))
    write_package(tmp_path / "2.zip", contents, tmp_path, None)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as opened:
        modes = {name: opened.getinfo(f"job/{name}").external_attr >> 16 for name in ("run.sh", "p.yaml")}
    assert modes == {"run.sh": 0o100755, "p.yaml": 0o100644}
