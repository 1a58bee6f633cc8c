"""What each way of packing cuts and pads: `python -m benchmarks.packing CORPUS.jsonl.gz ...`.

Counts, not times. "alone": the padding of the validation split if each slice packed its own documents.
"""

from __future__ import annotations

import argparse
import glob
import tempfile
from pathlib import Path
from typing import get_args

from data import held_out
from data.config import FilesSource, Packing, TokenizeFields, TokenizerFields
from data.packing import plan_validation, write_slice, write_validation
from data.records import NOTHING, SliceRecords
from data.sampling import sample_texts
from data.sources import plan_slices, slice_bytes_of
from data.tokenizer import Tokenizer, train_tokenizer


def measure(fields: TokenizeFields, tokenizer: Tokenizer) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        slices = plan_slices(fields.source, slice_bytes_of(fields))
        records = SliceRecords(write_slice(slice_, tokenizer, fields, out) for slice_ in slices)
        valid = NOTHING
        for stream in plan_validation(records, fields):
            files = {number: out / held_out.file_name(number) for number, _ in stream.slices}
            valid += write_validation(stream, files, fields, out).counts
        table_bytes = sum(path.stat().st_size for path in out.rglob("documents.parquet"))
    seq_len = fields.seq_len
    train = sum((record.train.counts for record in records if record.train), NOTHING)
    alone = sum(-(-record.held_out.num_tokens // seq_len) for record in records if record.held_out)
    train_padded, valid_padded = (
        counts.num_padded_tokens(seq_len) / counts.num_samples / seq_len for counts in (train, valid)
    )
    cells = [
        f"{seq_len:,}",
        fields.packing,
        str(len(slices)),
        f"{train_padded:.2%}",
        f"{train.num_cut_documents:,} of {train.num_documents:,}",
        f"{1 - valid.num_tokens / alone / seq_len:.1%}",
        f"{valid_padded:.1%}",
        f"{table_bytes / (train.num_documents + valid.num_documents):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+", help="files or globs of .jsonl, plain or compressed, with a field `text`")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--validation-fraction", type=float, default=0.02)
    parser.add_argument("--vocab-size", type=int, default=8192)
    options = parser.parse_args()
    paths = tuple(path for pattern in options.corpus for path in sorted(glob.glob(pattern)))
    source = FilesSource(kind="files", paths=paths)
    learnt = TokenizerFields(source=source, vocab_size=options.vocab_size, sample_bytes=4 << 20)
    tokenizer = train_tokenizer(sample_texts(source, learnt.sample_bytes), learnt)
    titles = "seq_len", "packing", "slices", "padded", "cut", "valid, alone", "valid padded", "table, B/document"
    print(f"| {' | '.join(titles)} |\n|--:|---|--:|--:|--:|--:|--:|--:|")
    for seq_len in options.seq_len:
        for packing in get_args(Packing):
            fields = TokenizeFields(
                source=source,
                seq_len=seq_len,
                packing=packing,
                slice_bytes=8 << 20,
                validation_fraction=options.validation_fraction,
            )
            print(measure(fields, tokenizer), flush=True)


if __name__ == "__main__":
    main()
