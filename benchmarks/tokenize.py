"""Tokenizing from end to end, beside tiktoken alone and datatrove: `python -m benchmarks.tokenize CORPUS.jsonl.gz ...`.

- ours: worker processes write the slices of the corpus, then the validation streams, then the indexes are merged: what
  the tokenize stage does, without Ray. Processes have started and loaded the tokenizer before the clock does.
- tiktoken alone: as many processes encode the same texts, which they hold in memory, and drop the ids.
- datatrove (--datatrove PYTHON, of an environment with `datatrove[io]` and `tokenizers`): its JsonlReader and
  DocumentTokenizer with the same tokenizer.json and as many workers. What the same takes for one document per file is
  subtracted, as its start.

Rounds alternate; prints megabytes of text per second, medians, and ratios. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import glob
import json
import multiprocessing
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from data import held_out
from data.config import FilesSource, TokenizeFields, TokenizerFields
from data.merging import check_slices, merge
from data.packing import plan_validation, write_slice, write_validation
from data.records import SliceRecord, SliceRecords, ValidationRecord
from data.sampling import sample_texts
from data.sources import Document, Slice, plan_slices, read_slice, slice_bytes_of
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils.logging import logger

folder, output, tokenizer, workers, eod = sys.argv[1:]
logger.remove()
if __name__ == "__main__":
    steps = [
        JsonlReader(folder),
        DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token=eod, shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=int(workers), workers=int(workers), logging_dir=output + "/logs").run()
"""

_tokenizer: Tokenizer
_texts: list[str]


def main() -> None:
    """Print a line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+", help="files or globs of .jsonl, plain or compressed, with a field `text`")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer that is trained on the corpus")
    parser.add_argument("--tokenizer", default=None, help="a folder with a tokenizer to take instead")
    parser.add_argument("--datatrove", default=None, help="the Python of an environment with datatrove")
    options = parser.parse_args()
    paths = tuple(path for pattern in options.corpus for path in sorted(glob.glob(pattern)))
    source = FilesSource(kind="files", paths=paths)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(options.tokenizer or folder + "/tokenizer")
        if options.tokenizer is None:
            learnt = TokenizerFields(source=source, vocab_size=options.vocab_size)
            train_tokenizer(sample_texts(source, learnt.sample_bytes), learnt).save(tokenizer)
        fields = TokenizeFields(source=source, seq_len=options.seq_len)
        texts = [
            document.text
            for slice_ in slices_of(fields)
            for document in read_slice(slice_)
            if isinstance(document, Document)
        ]
        num_bytes = sum(len(text.encode()) for text in texts)
        ways: dict[str, Callable[[Path], float]] = {
            "ours": lambda out: ours(fields, tokenizer, options.workers, out),
            "tiktoken alone": lambda out: tiktoken_alone(texts, tokenizer, options.workers),
        }
        if options.datatrove:
            ways["datatrove"] = lambda out: datatrove(options.datatrove, paths, tokenizer, options.workers, out)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                out = Path(folder, "out")
                rates[name].append(num_bytes / 1e6 / way(out))
                shutil.rmtree(out, ignore_errors=True)
    print(f"{num_bytes / 1e6:.1f} MB of text in {len(texts):,} documents, {options.workers} workers")
    own = statistics.median(rates["ours"])
    for name, of_rounds in rates.items():
        median = statistics.median(of_rounds)
        rounds = ", ".join(f"{rate:.2f}" for rate in of_rounds)
        print(f"{name:15} {median:6.2f} MB/s (rounds: {rounds}); ours is {own / median:.2f} of it")


def ours(fields: TokenizeFields, tokenizer: Path, workers: int, out: Path) -> float:
    """Seconds."""
    with started(workers, _load, [(tokenizer, ())] * workers) as pool:
        started_at = time.perf_counter()
        slices = slices_of(fields)
        records = SliceRecords(pool.map(_write_slice, slices, [fields] * len(slices), [out] * len(slices)))
        check_slices(records, fields)
        validation = []
        for stream in plan_validation(records, fields):
            files = {number: out / held_out.file_name(number) for number, _ in stream.slices}
            packed = pool.submit(write_validation, stream, files, fields, out).result()
            validation.append(ValidationRecord(index=stream.number, slices_sha256=stream.sha256, valid=packed))
        merge(out, records, validation, fields)
        return time.perf_counter() - started_at


def tiktoken_alone(texts: Sequence[str], tokenizer: Path, workers: int) -> float:
    """Seconds."""
    total, begun = sum(map(len, texts)), 0
    dealt: list[list[str]] = [[] for _ in range(workers)]
    for text in texts:
        dealt[min(begun * workers // total, workers - 1)].append(text)
        begun += len(text)
    with started(workers, _load, [(tokenizer, share) for share in dealt]) as pool:
        started_at = time.perf_counter()
        for future in [pool.submit(_encode) for _ in range(workers)]:
            future.result()
        return time.perf_counter() - started_at


def datatrove(python: str, paths: Sequence[str], tokenizer: Path, workers: int, out: Path) -> float:
    """Seconds, less those for one document per file."""
    seconds = []
    eod = load_tokenizer(tokenizer).end_of_document
    for number, is_small in enumerate((True, False)):
        folder = out / f"in-{number}"
        folder.mkdir(parents=True)
        for path in paths:
            if is_small:
                (folder / f"{Path(path).name.partition('.')[0]}.jsonl").write_text(json.dumps({"text": "text"}) + "\n")
            else:
                (folder / Path(path).name).symlink_to(Path(path).absolute())
        arguments = [str(folder), str(out / f"out-{number}"), str(tokenizer / "tokenizer.json"), str(workers), eod]
        (out / "datatrove_run.py").write_text(DATATROVE)
        started_at = time.perf_counter()
        subprocess.run([python, str(out / "datatrove_run.py"), *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started_at)
    return seconds[1] - seconds[0]


@contextmanager
def started(
    workers: int, load: Callable[..., None], arguments: Sequence[tuple[Path, Sequence[str]]]
) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, each of which has loaded one of the arguments."""
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.SimpleQueue(), context.Barrier(workers + 1)
    with ProcessPoolExecutor(workers, context, _start, (load, queue, barrier)) as pool:
        futures = [pool.submit(time.sleep, 0.1) for _ in range(workers)]  # starts them all
        for argument in arguments:
            queue.put(argument)
        barrier.wait()
        for future in futures:
            future.result()
        yield pool


def _start(load: Callable[..., None], queue: multiprocessing.SimpleQueue, barrier: threading.Barrier) -> None:
    load(*queue.get())
    barrier.wait()


def _load(tokenizer: Path, texts: Sequence[str]) -> None:
    global _tokenizer, _texts
    _tokenizer, _texts = load_tokenizer(tokenizer), list(texts)


def _write_slice(slice_: Slice, fields: TokenizeFields, out: Path) -> SliceRecord:
    return write_slice(slice_, _tokenizer, fields, out)


def _encode() -> None:
    encoding = _tokenizer._tiktoken
    assert encoding is not None
    for text in _texts:
        encoding.encode_to_numpy(text)


def slices_of(fields: TokenizeFields) -> list[Slice]:
    """As the stage cuts them."""
    return plan_slices(fields.source, slice_bytes_of(fields))


if __name__ == "__main__":
    main()
