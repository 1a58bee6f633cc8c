"""Where documents begin in packed rows, in the forms that callers of transformers say it."""

from __future__ import annotations

import torch
from torch import Tensor


def document_ids(
    tokens_bt: Tensor,
    valid_bt: Tensor | None,
    doc_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Tensor | None:
    """Document ids [b, t] as BMojoLM takes them; None if every row is one document.

    Args:
        valid_bt: which tokens are no padding; None: all.
        doc_ids, seq_idx: integers [b or 1, t] that change where a document begins.
        position_ids: [b or 1, t]; a document begins where a position does not follow the one before it.
        cu_seq_lens: where documents begin in the one row there is, and its end.
    Raises: ValueError: a shape does not fit, or two of them say different things.
    """
    b, t = tokens_bt.shape
    starts: dict[str, Tensor] = {}
    for name, given in (("doc_ids", doc_ids), ("seq_idx", seq_idx), ("position_ids", position_ids)):
        if given is not None:
            if given.dim() != 2 or given.shape[1] != t or given.shape[0] not in (1, b):
                raise ValueError(f"{name} has shape {tuple(given.shape)}, expected [{b} or 1, {t}] as input_ids.")
            step = 1 if name == "position_ids" else 0
            changes_bt = torch.zeros(b, t, dtype=torch.bool, device=tokens_bt.device)
            changes_bt[:, 1:] = given[:, 1:] != given[:, :-1] + step
            starts[name] = changes_bt
    if cu_seq_lens is not None:
        if b != 1 or int(cu_seq_lens[-1]) != t:
            raise ValueError(
                f"cu_seq_lens_q ends at {int(cu_seq_lens[-1])} for {b} rows of {t} tokens; expected one row."
            )
        changes_bt = torch.zeros(b, t, dtype=torch.bool, device=tokens_bt.device)
        changes_bt[0, cu_seq_lens[1:-1].long()] = True
        starts["cu_seq_lens_q"] = changes_bt
    if valid_bt is not None:
        inside_bt = valid_bt.clone()
        inside_bt[:, 1:] &= valid_bt[:, :-1]  # a row's first token begins no further document
        starts = {name: changes_bt & inside_bt for name, changes_bt in starts.items()}
    if not starts:
        return None
    (first, starts_bt), *others = starts.items()
    for name, changes_bt in others:
        if not torch.equal(changes_bt, starts_bt):
            raise ValueError(f"{first} and {name} disagree on where documents begin; give one of them.")
    return starts_bt.long().cumsum(1) if bool(starts_bt.any()) else None
