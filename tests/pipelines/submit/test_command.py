"""What `bmojo submit` refuses before it looks for a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = "name: mine\nstages:\n  tokenizer: {kind: tokenizer, source: {kind: python_stdlib}, vocab_size: 512}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tracking.uri=http://me:hidden-word@host"], 1, "override tracking.uri=...: its value looks like a secret"),
        (["--json", "--follow"], 2, "exclude each other"),
        (["--env", "BMOJO_NOT_SET"], 1, "--env BMOJO_NOT_SET: no such variable is set here"),
        (["--address", "ray://head:10001"], 1, "Submit to the dashboard of that cluster"),
        (["--working-dir", "nowhere"], 1, "--working-dir nowhere: no such folder"),
        (["tokenizer.vocab_size=many"], 1, "vocab_size"),
    ],
)
def test_what_is_wrong_here_is_said_at_once(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(PIPELINE)
    command = [sys.executable, "-m", "pipelines", "submit", str(tmp_path / "mine.yaml"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert words in " ".join(ended.stderr.replace("│", " ").split())
    assert "hidden-word" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
