"""Where a run's journals and logs are while they are written: in its directory, or here if that is far away."""

from __future__ import annotations

import hashlib
import logging
import threading
from pathlib import Path

from base.cache import cache_dir
from pipelines.storage import LocalStorage, Storage

SPOOL = "spool"  # the folder of local ones in the cache
_UPLOAD_EVERY_S = 20.0

log = logging.getLogger(__name__)


class Spool:
    """The directory `dir` holding a run's `journal/`, the `logs/` of its processes, and delivery cursors.

    On file storage it is the run directory. Else it is a local one: download() brings what an earlier driver elsewhere
    left, upload() makes what is new durable, and between start() and stop() a thread uploads now and then.
    """

    def __init__(self, storage: Storage, run_relpath: str) -> None:
        self._storage, self._relpath = storage, run_relpath
        if isinstance(storage, LocalStorage):
            self.dir = storage.path(run_relpath)
        else:
            digest = hashlib.sha256(storage.url_of(run_relpath).encode()).hexdigest()[:16]
            self.dir = cache_dir() / SPOOL / f"{Path(run_relpath).name}-{digest}"
        self.journal_dir = self.dir / "journal"
        self.log_dir = self.dir / "logs"
        self._uploaded: dict[str, int] = {}
        self._upload_lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_uploading, name="journal upload", daemon=True)

    def download(self) -> None:
        """Take over journals that have grown elsewhere. They only ever grow, so the longer copy is the later one."""
        if isinstance(self._storage, LocalStorage):
            return
        for name in self._storage.files_under(f"{self._relpath}/journal"):
            data = self._storage.read_bytes(f"{self._relpath}/journal/{name}")
            local = self.journal_dir / name
            if not local.exists() or local.stat().st_size < len(data):
                LocalStorage(self.journal_dir).write_bytes_atomic(name, data)
        for name in self._storage.list(self._relpath):
            if name.startswith("delivered-") and not (self.dir / name).exists():
                self._storage.get_file(f"{self._relpath}/{name}", self.dir / name)

    def start(self) -> None:
        """Begin to upload in the background (nothing to do on file storage)."""
        if not isinstance(self._storage, LocalStorage):
            self._thread.start()

    def stop(self) -> None:
        """Upload for the last time. A storage out of reach is only reported: the local journals stay."""
        if not isinstance(self._storage, LocalStorage):
            self._stopped.set()
            if self._thread.is_alive():  # not so if the run ended before start()
                self._thread.join()
            self._try_upload()

    def upload(self) -> None:
        """Make everything written so far durable."""
        if isinstance(self._storage, LocalStorage):
            return
        with self._upload_lock:
            for path in sorted(
                [
                    *self.journal_dir.glob("*.jsonl"),
                    *self.log_dir.glob("*.log"),
                    *self.dir.glob("delivered-*.json"),
                ]
            ):
                data = path.read_bytes()
                if self._uploaded.get(path.name) != hash(data):
                    relative = path.relative_to(self.dir).as_posix()
                    self._storage.write_bytes_atomic(f"{self._relpath}/{relative}", data)
                    self._uploaded[path.name] = hash(data)

    def _keep_uploading(self) -> None:
        while not self._stopped.wait(_UPLOAD_EVERY_S):
            self._try_upload()

    def _try_upload(self) -> None:
        try:
            self.upload()
        except Exception as error:
            log.warning("Could not copy the journals to %s: %s. They stay in %s.", self._storage.url, error, self.dir)
