"""`bmojo serve` and `bmojo chat` on a model that was really trained."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pipelines.end_to_end.tiny_pipeline import Finished, TinyPipeline
from tests.pipelines.serving.served import ROOT, environment

pytestmark = pytest.mark.slow


def bmojo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", *arguments]


def test_a_trained_model_is_served_and_talked_to(finished_pipeline: tuple[TinyPipeline, Finished], tmp_path: Path):
    pipeline, _ = finished_pipeline
    of = ["tiny", "--storage", str(pipeline.storage), "--states", str(tmp_path)]
    server = subprocess.Popen(
        bmojo("serve", *of, "--port", "0"), stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    assert server.stdout is not None
    url = next(found[1] for line in server.stdout if (found := re.search(r"Serving tiny\S+/train on (\S+)", line)))
    body = {"prompt": "ba", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "save_state": "a"}
    answered = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert answered["usage"]["completion_tokens"] == 8
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment(), "cwd": ROOT}
    greedy = ["--temperature", "0", "--tokens", "8"]
    done = subprocess.run(bmojo("chat", *of, *greedy, "--load", "a"), input="ba\n", **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    drawn = subprocess.run(bmojo("generate", *of[:3], *greedy, "--step", "12"), **options)
    assert drawn.returncode == 0, drawn.stderr
    missing = subprocess.run(bmojo("generate", *of[:3], "--step", "3"), **options)
    assert missing.returncode == 1
    assert "--step 3: there is no checkpoint of that step; kept: " in missing.stderr
