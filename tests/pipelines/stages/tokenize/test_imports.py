"""A process that tokenizes starts quickly and stays small: it loads none of the large libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pipelines.storage.artifact import ArtifactDir
from tests.data.corpora import TEXTS, write
from tests.pipelines.stages.trained_run import tiny_tokenizer

LARGE = {
    "torch",
    "transformers",
    "streaming",
    "pandas",
    "torchvision",
    "sklearn",
    "scipy",
    "boto3",
    "mlflow",
    "datasets",
}
SCRIPT = """
import json, sys
from data.config import FilesSource, PackingFields
from data.packing import plan_validation
from data.records import SliceRecords
from data.sources import plan_slices
from pipelines.stages.tokenize import writing  # what Ray imports to find the function of a task
from pipelines.stages.tokenize.stored_tokenizer import StoredTokenizer
from pipelines.storage.artifact import ArtifactDir

tokenizer, sha256, out, *paths = sys.argv[1:]
tokenizer, out = StoredTokenizer(ArtifactDir.at(tokenizer), sha256), ArtifactDir.at(out)
fields = PackingFields(seq_len=16, validation_fraction=0.5)
slices = plan_slices(FilesSource(kind="files", paths=tuple(paths)), 1024)
records = SliceRecords(writing._tokenize_slice(s, fields, tokenizer, "", out) for s in slices)
for stream in plan_validation(records, fields):
    writing._pack_validation(stream, fields, out)
assert len(records) > 3 and list(out.local.glob("valid/*/*.mds"))
print(json.dumps(sorted(sys.modules)))
"""


def test_the_tasks_of_tokenize_load_no_large_library(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "made" / "tokenizer")
    paths = [write(tmp_path / f"c.{suffix}", [f"{suffix} {text}" for text in TEXTS * 5]) for suffix in
             ("jsonl", "txt", "jsonl.gz", "jsonl.zst", "parquet")]  # fmt: skip
    out = ArtifactDir.at(tmp_path / "out")
    arguments = [tmp_path / "made", tokenizer.sha256, out.url, *paths]
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    loaded = set(json.loads(found.stdout))
    assert {"tiktoken", "pyarrow.parquet", "zstandard"} <= loaded
    assert sorted(loaded & LARGE) == []
