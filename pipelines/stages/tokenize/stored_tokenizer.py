"""The tokenizer of a `tokenize` stage: in its artifact, where its tasks and all who read its shards find it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from base.errors import DamagedError
from data.config import BytesSource, TokenizeFields
from pipelines.engine.stage import StageNode
from pipelines.stages.tokenizer.stage import TOKENIZER_FOLDER, TokenizerStage
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer in the folder for it in an artifact, and its identity."""

    artifact: ArtifactDir
    sha256: str


def store_tokenizer(
    fields: TokenizeFields, needed: StageNode[TokenizerStage] | None, artifact: ArtifactDir
) -> StoredTokenizer | None:
    """Put the tokenizer into the artifact: that of the stage that is needed, or the one of bytes.

    Returns: None if the token ids are no text.
    """
    if needed is not None:
        sha256 = needed.output.sha256
        folder = needed.artifact.fetch(TOKENIZER_FOLDER)
        shutil.copytree(folder, artifact.local / TOKENIZER_FOLDER, dirs_exist_ok=True)
    elif isinstance(fields.source, BytesSource):
        from data.tokenizer import byte_tokenizer

        tokenizer = byte_tokenizer()
        sha256 = tokenizer.sha256
        tokenizer.save(artifact.local / TOKENIZER_FOLDER)
    else:
        return None
    artifact.publish(TOKENIZER_FOLDER)
    return StoredTokenizer(artifact, sha256)


_loaded: dict[tuple[str, str], Tokenizer] = {}  # by URL and digest: a worker process does many slices with one


def load_tokenizer(stored: StoredTokenizer) -> Tokenizer:
    """The tokenizer, loaded once a process. Raises DamagedError: it is not the one that was stored."""
    from data.tokenizer import load_tokenizer as load

    artifact, sha256 = stored.artifact, stored.sha256
    if (artifact.url, sha256) not in _loaded:
        tokenizer = load(artifact.fetch(TOKENIZER_FOLDER))
        if tokenizer.sha256 != sha256:
            raise DamagedError(
                f"{artifact.url}/{TOKENIZER_FOLDER}: another tokenizer than its stage made (digest "
                f"{tokenizer.sha256[:16]}..., expected {sha256[:16]}...). {artifact.remedy}"
            )
        _loaded[artifact.url, sha256] = tokenizer
    return _loaded[artifact.url, sha256]
