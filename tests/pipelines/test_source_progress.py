"""Reading the files of a source is shown when it takes a while: a bar on a terminal, lines in a log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from data.config import FilesSource
from data.sources import content_identity, digests
from pipelines.cli import progress as shown
from pipelines.cli.progress import progress_display, source_progress


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("is_slow", [True, False])
def test_what_takes_a_while_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, is_slow: bool
) -> None:
    monkeypatch.setenv("BMOJO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SHOWN_AFTER_S", -1.0 if is_slow else 1000.0)
    monkeypatch.setattr(digests, "_SHOWN_EVERY_S", 0.0)
    monkeypatch.setattr(shown, "LOG_EVERY_S", -1.0)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * (2 << 20))
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=100)
    with progress_display(console) as progress, source_progress(progress, console):
        content_identity(FilesSource(kind="files", paths=(str(tmp_path / "*.txt"),)))
    assert ("reading the source's files" in written.getvalue()) == is_slow
    if is_slow:
        assert ("/6" if is_terminal else "2 of 6 MB") in written.getvalue()
