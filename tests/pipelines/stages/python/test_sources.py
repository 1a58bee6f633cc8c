"""Which modules belong to a python stage, found without importing any of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from base.errors import UserError
from pipelines.stages.python.config import PythonStageConfig
from pipelines.stages.python.sources import Sources, find_sources

EXPLODES = "raise SystemExit('imported')\n"


def sources(folder: Path, call: str = "mine:work", modules: tuple[str, ...] = ()) -> Sources:
    return find_sources(PythonStageConfig(kind="python", call=call, modules=modules, folder=str(folder)))


def write(folder: Path, **texts: str) -> None:
    """Modules by name, with two underscores for a dot."""
    for name, text in texts.items():
        file = folder / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def names(found: Sources) -> list[str]:
    return [file.module for file in found.files]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stage's folder; the current one is another."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "stages").mkdir()
    return tmp_path / "stages"


def test_imports_are_followed_through_the_users_own_modules_only(folder: Path) -> None:
    write(
        folder,
        mine=EXPLODES + "import helper\nimport numpy, json\nfrom data.shards import read_index\ndef work(stage): ...\n",
        helper="def f():\n    from deep import inner\n",
        deep__inner="",
        unused="",
    )
    (folder / "deep" / "__init__.py").touch()
    (folder / "json.py").write_text("")
    assert names(sources(folder)) == ["deep", "deep.inner", "helper", "mine"]
    assert "mine" not in sys.modules


def test_relative_imports_and_packages_without_an_init_are_followed(folder: Path) -> None:
    write(
        folder,
        team__stages__mine="from . import near\nfrom ..util import x\nfrom .other.deepest import y\ndef work(stage): 1",
        team__stages__near="",
        team__util="",
        team__stages__other__deepest="from ...util import x",
        near="",
    )
    found = names(sources(folder, "team.stages.mine:work"))
    assert found == ["team.stages.mine", "team.stages.near", "team.stages.other.deepest", "team.util"]


def test_modules_named_in_the_settings_count_with_what_they_import(folder: Path) -> None:
    write(folder, mine="def work(stage): ...", plugin="import part", part="")
    assert names(sources(folder)) == ["mine"]
    assert names(sources(folder, modules=("plugin",))) == ["mine", "part", "plugin"]


def test_the_stages_folder_comes_before_the_current_one(folder: Path) -> None:
    write(folder, mine="import beside\ndef work(stage): ...")
    write(Path.cwd(), mine="wrong", beside="")
    (mine, beside) = reversed(sources(folder).files)
    assert (mine.path, beside.path) == (folder / "mine.py", Path.cwd() / "beside.py")


def test_an_installed_package_may_be_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = folder.parent / "site"
    write(installed, theirs__mine="import theirs.more, alone\ndef work(stage): ...", theirs__more="", alone="")
    (installed / "theirs" / "__init__.py").write_text(EXPLODES)
    monkeypatch.syspath_prepend(installed)
    assert names(sources(folder, "theirs.mine:work")) == ["theirs", "theirs.mine", "theirs.more"]
    (folder / "theirs").mkdir()  # no module: a checkout of it, or data
    assert names(sources(folder, "theirs.mine:work")) == ["theirs", "theirs.mine", "theirs.more"]


def test_each_module_has_a_digest_of_its_text_and_place(folder: Path) -> None:
    write(folder, mine="import helper\ndef work(stage): ...", helper="x = 1\n")
    first = sources(folder).digests
    assert list(first) == ["source of helper", "source of mine"]
    write(folder, helper="x = 2\n", unused="")
    second = sources(folder).digests
    assert second["source of helper"] != first["source of helper"]
    assert second["source of mine"] == first["source of mine"]


def test_what_is_written_down_is_what_was_found_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    write(folder, team__mine="import team.util\r\ndef work(stage): ...", team__util="")
    (folder / "team" / "__init__.py").touch()
    (folder / "team" / "util.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'naïve'\n".encode("latin-1"))
    target = tmp_path / "source"
    (target / "old").mkdir(parents=True)
    found = sources(folder, "team.mine:work")
    found.write(target)
    written = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert written == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("mime:work", "call: there is no module 'mime' in {folder} or {here}, and no installed package of that name. "
                      "Did you mean 'mine'? Put mime.py there, or name its folder with `folder`."),
        ("mine.sub:work", "call: the package 'mine' in {folder} has no module 'sub' with Python source. Expected "
                          "{folder}/mine/sub.py."),
        ("empty:work", "call: the {folder}/empty is no module with Python source. Expected {folder}/empty.py."),
        ("random:work", "call: 'random' is the name of a module of Python itself. Rename your file, and call with it."),
        ("data.mine:work", "call: 'data.mine' is the name of a module of this program itself."),
        ("mine:wrok", "call: {folder}/mine.py has no 'wrok'. Did you mean 'work'?"),
        ("mine:value.x", "call: {folder}/mine.py has no 'value'. Its functions: work, none, two."),
        ("mine:none", "{folder}/mine.py:3: none() is called with one argument, the running stage. Write `def none("
                      "stage)`; your settings are in stage.args."),
        ("mine:two", "{folder}/mine.py:4: two(a, *, b) is called with one argument"),
        ("broken:work", "{folder}/broken.py:2: not valid Python: expected ':'. Correct this line."),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_named_with_its_place(folder: Path, call: str, problem: str) -> None:
    write(
        folder,
        mine="def work(stage): ...\nif True: other = 1\ndef none(): ...\ndef two(a, *, b): ...\n",
        broken="x = 1\ndef work(stage)\n",
    )
    (folder / "empty").mkdir()
    with pytest.raises(UserError) as refused:
        sources(folder, call)
    assert str(refused.value).startswith(problem.format(folder=folder, here=Path.cwd()))


@pytest.mark.parametrize(
    "text",
    [
        "from elsewhere import work",
        "from elsewhere import *",
        "work = print",
        "try:\n    from fast import work\nexcept ImportError:\n    def work(stage): ...",
        "class work:\n    def __init__(self, stage): ...",
        "@decorated\ndef work(): ...",
        "def work(stage, limit=3): ...",
        "def work(*stages): ...",
    ],
)
def test_a_function_may_be_defined_in_other_ways(folder: Path, text: str) -> None:
    write(folder, mine=text)
    assert names(sources(folder)) == ["mine"]
