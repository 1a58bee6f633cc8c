"""A stage of your own: how much of its tokenizer's vocabulary a corpus uses. pipeline.yaml beside it calls it."""

from __future__ import annotations

from itertools import islice

import numpy as np

from data.shards import TokenSplit, read_token_documents
from pipelines.stages.python import RunningStage


def coverage(stage: RunningStage) -> dict[str, float]:
    """Count how often each token id occurs in the training split.

    Writes counts.npy, whose entry i is the count of id i. Kept between attempts with the number of documents counted.
    """
    tokens = stage.inputs["tokens"]
    facts = tokens.output  # a TokenizeOutput
    state = stage.folder / "state.npz"
    counts, num_before = np.zeros(facts.vocab_size, np.int64), 0
    if state.exists():  # an earlier attempt was interrupted
        with np.load(state) as saved:
            counts, num_before = saved["counts"], int(saved["done"])
        stage.log.info("resuming after %d documents", num_before)

    documents = islice(read_token_documents(TokenSplit(tokens.path, "train")), num_before, None)
    for done, ids in enumerate(documents, num_before + 1):
        counts += np.bincount(ids, minlength=len(counts))
        if done % stage.args["save_every"] == 0:
            _save(stage, counts, done)
        stage.progress(done, facts.num_train_documents)

    state.unlink(missing_ok=True)
    np.save(stage.folder / "counts.npy", counts)
    share = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    return {
        "vocabulary/used": np.count_nonzero(counts) / len(counts),
        "vocabulary/ids_for_share": int(np.searchsorted(share, stage.args["share"])) + 1,
    }


def _save(stage: RunningStage, counts: np.ndarray, done: int) -> None:
    stage.log_metrics(done, {"vocabulary/used": np.count_nonzero(counts) / len(counts)})
    unfinished = stage.folder / "unfinished.npz"  # a process may be killed while it writes
    np.savez(unfinished, counts=counts, done=done)
    unfinished.rename(stage.folder / "state.npz")
    stage.save()
