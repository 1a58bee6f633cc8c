"""Filters of a `tokenize` stage: their code and files, and the passes of those that compare documents, as Ray tasks.

In the artifact: comparisons/K.npy, what the K-th filter that compares documents leaves out (data.filters.duplicates),
with the record comparisons/K.json; while it is found, fingerprints of each slice in comparisons/K/NNNNN/; and the
source of filters that are functions of the user's in filters/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data.config import FilesSource
from data.filters import AnyFilter
from data.filters.decontamination import Decontamination
from data.filters.duplicates import DuplicateFilter, find_pairs, join_pairs
from data.filters.python import Python
from data.filters.screening import Screening, Verdict, write_slice_fingerprints
from data.sources import (
    Slice,
    content_identity,
    local_paths,
    plan_slices,
    read_slice,
    slice_bytes_of,
    with_absolute_paths,
)
from pipelines.engine.stage import Resources
from pipelines.faults import explained_disk
from pipelines.stages.python.sources import Sources, find_sources
from pipelines.stages.python.task import importable
from pipelines.stages.tasks import run_tasks
from pipelines.storage.artifact import ArtifactDir

if TYPE_CHECKING:
    import numpy as np

    from pipelines.stages.tokenize.stage import TokenizeStageConfig

_FOLDER = "comparisons"
_CODE_FOLDER = "filters"
_DOCUMENTS_AT_ONCE = 1 << 22  # whose keys one task compares

Filters = tuple[AnyFilter, ...]


@dataclass(frozen=True)
class ShippedCode:
    """The source of functions of the user's, in an artifact. `modules`: their files where the user wrote them."""

    artifact: ArtifactDir | None = None
    modules: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Let these modules be imported."""
        if self.artifact is None:
            yield
            return
        with importable(self.artifact.fetch(_CODE_FOLDER), self.modules):
            yield


NO_CODE = ShippedCode()


def code_of(filters: Filters) -> list[Sources]:
    """The source of functions of the user's. Raises UserError: a module or function is missing or invalid."""
    return [find_sources(filter_, "the text") for filter_ in filters if isinstance(filter_, Python)]


def content_of(filters: Filters) -> dict[str, str]:
    """Digests of what filters read outside the storage, by what it is. Raises as content_identity and find_sources."""
    digests = {
        f"texts of {', '.join(filter_.paths)}": content_identity(filter_.source)
        for filter_ in filters
        if isinstance(filter_, Decontamination)
    }
    for sources in code_of(filters):
        digests |= sources.digests
    return digests


def files_of(filters: Filters) -> tuple[str, ...]:
    """Files of this machine that filters read, as the settings name them."""
    return tuple(
        path for filter_ in filters if isinstance(filter_, Decontamination) for path in local_paths(filter_.source)
    )


def ship(filters: Filters, artifact: ArtifactDir) -> tuple[Filters, ShippedCode]:
    """Put the code of filters into the artifact. Returns: filters for processes on other machines, and that code."""
    code = NO_CODE
    found = {file.relpath: file for sources in code_of(filters) for file in sources.files}
    if found:
        sources = Sources(tuple(found.values()))
        sources.write(artifact.local / _CODE_FOLDER)
        artifact.publish(_CODE_FOLDER)
        code = ShippedCode(artifact, {file.module: str(file.path) for file in sources.files})
    shipped: list[AnyFilter] = []
    for filter_ in filters:
        if isinstance(filter_, Decontamination):
            absolute = with_absolute_paths(filter_.source)
            assert isinstance(absolute, FilesSource)
            filter_ = filter_.model_copy(update={"paths": absolute.paths})
        elif isinstance(filter_, Python):
            filter_ = filter_.model_copy(update={"folder": None})
        shipped.append(filter_)
    return tuple(shipped), code


def compare_documents(
    slices: Sequence[Slice],
    filters: Filters,
    code: ShippedCode,
    source_stamp: str,
    resources: Resources,
    artifact: ArtifactDir,
) -> Screening:
    """Let each filter that compares documents find what it leaves out; what was found before is read again."""
    screening = Screening(filters)
    while (comparing := screening.next_comparison()) is not None:
        number = len(screening.left_out)
        left_out = _finished(number, source_stamp, artifact)
        if left_out is None:
            left_out = _compare(slices, screening, comparing, code, source_stamp, resources, artifact)
        screening = screening._replace(left_out=(*screening.left_out, left_out))
    return screening


def verdicts(config: TokenizeStageConfig, artifact: ArtifactDir) -> Iterator[Verdict]:
    """What the filters of a finished stage say of each document of its source, in order. Reads the source.

    Raises: UserError: the source or a module is missing. FileNotFoundError: the stage is not finished.
    """
    import numpy as np

    num_comparisons = sum(isinstance(filter_, DuplicateFilter) for filter_ in config.filters)
    found = [np.load(artifact.fetch(f"{_FOLDER}/{number}.npy")) for number in range(num_comparisons)]
    screening = Screening(config.filters, tuple(found))
    for slice_ in plan_slices(config.source, slice_bytes_of(config)):
        yield from screening.verdicts(read_slice(slice_), slice_.index)


def _compare(
    slices: Sequence[Slice],
    screening: Screening,
    comparing: DuplicateFilter,
    code: ShippedCode,
    source_stamp: str,
    resources: Resources,
    artifact: ArtifactDir,
) -> np.ndarray:
    import numpy as np

    folder = f"{_FOLDER}/{len(screening.left_out)}"
    counts = {}
    for name in artifact.listdir(folder):
        if name.endswith(".json") and (noted := artifact.read_json(f"{folder}/{name}"))["source_stamp"] == source_stamp:
            counts[int(noted["slice"])] = int(noted["num_documents"])
    calls = [
        (slice_, screening.of_slice(slice_.index), code, folder, source_stamp, artifact)
        for slice_ in slices
        if slice_.index not in counts
    ]
    counts |= dict(run_tasks(_note_fingerprints, calls, resources)) if calls else {}
    folders = [f"{folder}/{index:05d}" for index, count in sorted(counts.items()) if count]
    num_parts = -(-sum(counts.values()) // _DOCUMENTS_AT_ONCE)
    pairs = np.empty((0, 2), np.int64)
    comparisons = [
        (folders, comparing, column, part, num_parts, artifact)
        for column in range(comparing.num_columns)
        for part in range(num_parts)
    ]
    for found in run_tasks(_find_pairs, comparisons, resources) if comparisons else ():
        pairs = np.unique(np.concatenate([pairs, found]), axis=0)
    left_out = join_pairs(pairs)
    np.save(artifact.local / f"{folder}.npy", left_out)
    artifact.publish(f"{folder}.npy")
    artifact.write_json(f"{folder}.json", {"source_stamp": source_stamp})
    artifact.delete(folder)
    return left_out


def _finished(number: int, source_stamp: str, artifact: ArtifactDir) -> np.ndarray | None:
    """What a comparison found, if it was finished for these files."""
    import numpy as np

    name = f"{_FOLDER}/{number}"
    if not artifact.exists(f"{name}.json") or artifact.read_json(f"{name}.json")["source_stamp"] != source_stamp:
        return None
    found: np.ndarray = np.load(artifact.fetch(f"{name}.npy"))
    return found


def _note_fingerprints(
    slice_: Slice, screening: Screening, code: ShippedCode, folder: str, source_stamp: str, artifact: ArtifactDir
) -> tuple[int, int]:
    """Runs as a Ray task. Returns the number of the slice and of its documents."""
    name = f"{folder}/{slice_.index:05d}"
    with explained_disk(artifact.local), code.importable():
        num_documents = write_slice_fingerprints(slice_, screening, artifact.local / name)
    if num_documents:
        artifact.publish(name)
    noted = {"slice": slice_.index, "num_documents": num_documents, "source_stamp": source_stamp}
    artifact.write_json(f"{name}.json", noted)
    return slice_.index, num_documents


def _find_pairs(
    folders: Sequence[str], comparing: DuplicateFilter, column: int, part: int, num_parts: int, artifact: ArtifactDir
) -> np.ndarray:
    """Runs as a Ray task."""
    return find_pairs([artifact.fetch(folder) for folder in folders], comparing, column, part, num_parts)
