"""Results of tasks in the stage's artifact: a killed evaluation repeats none that is there.

tasks/<measure>/<key>.npz     arrays by name, and the SHA-256 of all of them; whole or absent; read without pickle
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from base.errors import DamagedError
from pipelines.storage.artifact import ArtifactDir

FOLDER = "tasks"
_DIGEST = "sha256"
_READS_AT_ONCE = 16

logger = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]


def keep(artifact: ArtifactDir, measure: str, key: str, result: Arrays) -> None:
    """Write the result of a task: from here on it is not done again."""
    artifact.write_bytes(_name(measure, key), pack(result))


def kept(artifact: ArtifactDir, measure: str, keys: Iterable[str]) -> dict[str, Arrays]:
    """The results that are there. One that is not as it was written is left out, with a warning."""
    present = set(artifact.listdir(f"{FOLDER}/{measure}"))

    def read(key: str) -> Arrays | None:
        name = _name(measure, key)
        try:
            return unpack(artifact.read_bytes(name), f"{artifact.url}/{name}")
        except DamagedError as error:
            logger.warning("%s. The task is done again. Look for a failing disk.", error)
            return None

    wanted = [key for key in keys if f"{key}.npz" in present]
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return {key: result for key, result in zip(wanted, pool.map(read, wanted), strict=True) if result is not None}


def pack(arrays: Arrays) -> bytes:
    """Arrays as the content of an .npz file, with their digest. Raises: ValueError: one holds objects."""
    if any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError(f"found an array of objects among {', '.join(arrays)}: expected numbers or text.")
    buffer = io.BytesIO()
    np.savez(buffer, **{**arrays, _DIGEST: np.array(_digest(arrays))})
    return buffer.getvalue()


def unpack(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of `pack`. Raises: DamagedError: the file `name` is not as it was written."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        digest = str(arrays.pop(_DIGEST))
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedError(f"{name}: damaged: it should hold arrays with their digest ({error})") from error
    if digest != _digest(arrays):
        raise DamagedError(f"{name}: damaged: its content does not match the digest in it")
    return arrays


def _name(measure: str, key: str) -> str:
    return f"{FOLDER}/{measure}/{key}.npz"


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        head = f"{name} {array.dtype.str} {array.shape}".encode()
        digest.update(len(head).to_bytes(8, "big") + head + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
