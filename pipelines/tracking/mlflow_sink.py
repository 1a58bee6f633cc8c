"""Applies journal events to MLflow. Every operation may be repeated: applying an event twice changes nothing.

One parent run per pipeline run and one child per stage, found again by their tags, so that no crash makes a second one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.errors import InfrastructureError
from pipelines.faults import explain_disk
from pipelines.storage import LocalStorage
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.target import SQLITE_FILE, TrackingTarget, sqlite_uri
from pipelines.tracking.trouble import DiskError, RefusedError, brief, deleted_experiment

_MLFLOW_STATUS = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED", "RESUMABLE": "KILLED"}
_MAX_METRICS = 1000  # mlflow.utils.validation.MAX_METRICS_PER_BATCH
_MAX_PARAMS = 100  # MAX_PARAMS_TAGS_PER_BATCH
_MAX_PARAM_VALUE = 6000  # MAX_PARAM_VAL_LENGTH
_MAX_KEY = 250  # MAX_ENTITY_KEY_LENGTH
_MAX_TAG_VALUE = 8000  # MAX_TAG_VAL_LENGTH
_MAX_DIGEST = 36  # MAX_DATASET_DIGEST_SIZE

Event = dict[str, Any]


class UnsendableError(ValueError):
    """A journal event that no server could be told."""


class MlflowSink:
    """A pipeline run in one MLflow store. Not for several threads.

    Its methods raise MLflow's and the network's errors; trouble.diagnose says what they mean.
    """

    def __init__(self, target: TrackingTarget, run_id: str) -> None:
        """Raises: RefusedError: the store is a SQLite file that cannot be opened. ImportError: MLflow is missing."""
        import mlflow

        for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.store.model_registry"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # the replayer tells of it, once
        if target.artifact_root is not None:
            try:
                target.artifact_root.mkdir(parents=True, exist_ok=True)
                _create_sqlite_store(target.artifact_root.parent / SQLITE_FILE)
            except OSError as error:
                raise _unusable(target, error) from error
        _check_sqlite(target)
        self._target, self._run_id = target, run_id
        self._client = mlflow.MlflowClient(tracking_uri=target.uri, registry_uri=target.uri)
        self._experiment_id: str | None = None

    def connect(self) -> str:
        """MLflow's id of the experiment, made if there is none: what every delivery needs first.

        Raises: RefusedError: the experiment was deleted.
        """
        return self._experiment()

    def open_run(self, stage: str | None, time_ms: int) -> str:
        """MLflow's id of the run of a stage, or of the pipeline run (None); made where there is none yet."""
        experiment = self._experiment()
        quoted = self._run_id.replace("'", "")
        role = f"tags.`bmojo.stage` = '{stage}'" if stage else "tags.`bmojo.role` = 'pipeline'"
        found = self._client.search_runs(
            [experiment], f"tags.`bmojo.run_id` = '{quoted}' and {role}", order_by=["attributes.start_time ASC"]
        )
        if found:
            return str(found[0].info.run_id)
        tags = {"bmojo.run_id": self._run_id, "bmojo.role": "stage" if stage else "pipeline"}
        if stage:
            tags |= {"bmojo.stage": stage, "mlflow.parentRunId": self.open_run(None, time_ms)}
        name = f"{self._run_id}/{stage}" if stage else self._run_id
        return str(self._client.create_run(experiment, start_time=time_ms, tags=tags, run_name=name).info.run_id)

    def is_there(self, mlflow_run: str) -> bool:
        """Whether a run still exists in the store and was not deleted there."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(mlflow_run).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def log_metrics(self, mlflow_run: str, events: Sequence[Event]) -> None:
        """Send the points of several `metrics` events with their own times, in as few requests as allowed."""
        from mlflow.entities import Metric

        points = [
            Metric(name[:_MAX_KEY], value, event["t"], event["step"])
            for event in events
            for name, value in event["values"].items()
        ]
        for start in range(0, len(points), _MAX_METRICS):
            self._client.log_batch(mlflow_run, metrics=points[start : start + _MAX_METRICS])

    def apply(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        """Apply any event but `metrics`. `artifact_url` is where the stage's files are."""
        handler = getattr(self, f"_apply_{event['event']}", None)
        if handler is None:
            raise UnsendableError(f"journal event of unknown type {event['event']!r}")
        handler(mlflow_run, event, artifact_url)

    def _apply_start(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._client.update_run(mlflow_run, status="RUNNING")
        self._set_tags(mlflow_run, {**event["tags"], "bmojo.status": "RUNNING"})

    def _apply_end(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._set_tags(mlflow_run, {**event["tags"], "bmojo.status": event["status"]})
        self._client.set_terminated(mlflow_run, _MLFLOW_STATUS[event["status"]], end_time=event["t"])

    def _apply_tags(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._set_tags(mlflow_run, event["tags"])

    def _apply_params(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        """MLflow's params cannot change: of one that did (resources, on a resume) the first value stays.

        The latest is in config.json.
        """
        from mlflow.entities import Param

        known = self._client.get_run(mlflow_run).data.params
        params = [
            Param(name[:_MAX_KEY], _text(value)[:_MAX_PARAM_VALUE])
            for name, value in event["params"].items()
            if name[:_MAX_KEY] not in known
        ]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(mlflow_run, params=params[start : start + _MAX_PARAMS])

    def _apply_dataset(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = event["source"]
        scheme = source.partition("://")[0] if "://" in source else "local"
        dataset = Dataset(
            name=event["name"],
            digest=event["digest"][:_MAX_DIGEST],
            source_type=scheme,
            source=json.dumps({"uri": source}),
            profile=json.dumps(event["profile"]),
        )
        tags = [InputTag("mlflow.data.context", event["context"])]
        self._client.log_inputs(mlflow_run, datasets=[DatasetInput(dataset, tags=tags)])

    def _apply_json(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._client.log_dict(mlflow_run, event["content"], event["file"])

    def _apply_artifact(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._upload(mlflow_run, event["path"], artifact_url)

    def _apply_model(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        """Register a model version for this run, once."""
        from mlflow.exceptions import MlflowException

        self._upload(mlflow_run, event["path"], artifact_url)
        try:
            self._client.create_registered_model(event["name"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        name = event["name"].replace("'", "")
        if not self._client.search_model_versions(f"name = '{name}' and run_id = '{mlflow_run}'"):
            source = f"{self._client.get_run(mlflow_run).info.artifact_uri}/{event['path']}"
            self._client.create_model_version(
                event["name"], source, run_id=mlflow_run, tags=event["tags"], await_creation_for=0
            )

    def _upload(self, mlflow_run: str, path: str, artifact_url: str | None) -> None:
        if artifact_url is None:
            raise UnsendableError(f"{path}: the journal does not say in which artifact directory it is")
        artifact = ArtifactDir.at(artifact_url)
        if isinstance(artifact.storage, LocalStorage):
            local = artifact.storage.path(artifact.relpath) / path
            if not os.access(local, os.R_OK):
                raise UnsendableError(f"{local} cannot be read")
            self._send(mlflow_run, local, path)
            return
        with tempfile.TemporaryDirectory(
            prefix="bmojo-"
        ) as scratch:  # its own copy: the stage may be using its scratch
            local = Path(scratch) / PurePosixPath(path).name
            artifact.storage.get_tree(f"{artifact.relpath}/{path}", local)
            self._send(mlflow_run, local, path)

    def _send(self, mlflow_run: str, local: Path, path: str) -> None:
        if local.is_dir():
            self._client.log_artifacts(mlflow_run, str(local), artifact_path=path)
        else:
            parent = str(PurePosixPath(path).parent)
            self._client.log_artifact(mlflow_run, str(local), artifact_path=None if parent == "." else parent)

    def _set_tags(self, mlflow_run: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(name[:_MAX_KEY], value[:_MAX_TAG_VALUE]) for name, value in tags.items()]
        for start in range(0, len(entities), _MAX_PARAMS):
            self._client.log_batch(mlflow_run, tags=entities[start : start + _MAX_PARAMS])

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        if self._experiment_id is None:
            experiment = self._client.get_experiment_by_name(self._target.experiment)
            if experiment is not None and experiment.lifecycle_stage != "active":
                raise RefusedError(deleted_experiment(self._target, str(experiment.experiment_id)))
            if experiment is not None:
                self._experiment_id = str(experiment.experiment_id)
            else:
                root = self._target.artifact_root
                try:
                    self._experiment_id = str(
                        self._client.create_experiment(self._target.experiment, root.as_uri() if root else None)
                    )
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    return self._experiment()  # another driver was quicker
        return self._experiment_id


def _create_sqlite_store(path: Path) -> None:
    """Make a new store complete or not at all: MLflow cannot go on from migrations that were interrupted."""
    if path.exists():
        return
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine_with_retry

    with tempfile.TemporaryDirectory(prefix=".creating-", dir=path.parent) as scratch:
        unfinished = Path(scratch) / path.name
        engine = create_sqlalchemy_engine_with_retry(sqlite_uri(unfinished))
        _initialize_tables(engine)
        engine.dispose()
        with contextlib.suppress(FileExistsError):  # another driver was quicker
            os.link(unfinished, path)


def _check_sqlite(target: TrackingTarget) -> None:
    """Open a SQLite store once by itself: MLflow would try for minutes, with a warning each time."""
    if not target.uri.startswith("sqlite"):
        return
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        path = make_url(target.uri).database
        if path:
            with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
                connection.execute("PRAGMA schema_version").fetchone()
    except (sqlite3.Error, ArgumentError) as error:
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise
        raise _unusable(target, error) from error


def _unusable(target: TrackingTarget, error: Exception) -> Exception:
    if isinstance(error, OSError):
        explained = explain_disk(error)
        if isinstance(explained, InfrastructureError):  # a full disk, not a wrong place
            return DiskError(str(explained))
    return RefusedError(
        f"the store {target.shown_uri} cannot be opened ({brief(error)}). Check that its folder exists and may be "
        "written, or set tracking.uri or MLFLOW_TRACKING_URI to another store."
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
