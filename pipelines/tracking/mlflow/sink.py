"""Applies journal events to MLflow. Applying an event twice changes nothing.

One parent run per pipeline run and one child per stage, found again by their tags, so that no crash makes a second one.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from base.errors import UserError
from pipelines.redact import redact
from pipelines.storage import LocalStorage
from pipelines.storage.artifact import ArtifactDir
from pipelines.tracking.mlflow.store import check_store, prepare_store
from pipelines.tracking.mlflow.trouble import deleted_experiment, is_unacceptable
from pipelines.tracking.sink import Event, UnsendableError

_MLFLOW_STATUS = {
    "SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED", "RESUMABLE": "KILLED", "STOPPED": "KILLED",
}  # fmt: skip
_MAX_METRICS = 1000  # mlflow.utils.validation.MAX_METRICS_PER_BATCH
_MAX_PARAMS = 100  # MAX_PARAMS_TAGS_PER_BATCH
_MAX_PARAM_VALUE = 6000  # MAX_PARAM_VAL_LENGTH
_MAX_KEY = 250  # MAX_ENTITY_KEY_LENGTH
_MAX_TAG_VALUE = 8000  # MAX_TAG_VAL_LENGTH
_MAX_DIGEST = 36  # MAX_DATASET_DIGEST_SIZE


class MlflowSink:
    """A pipeline run in one MLflow store: a Sink."""

    def __init__(self, uri: str, experiment: str, artifact_root: Path | None, run_id: str) -> None:
        """Connect, and make the experiment if there is none.

        Args: artifact_root: of a SQLite store of our own, which is made beside it; None if `uri` names another.
        Raises: UserError: a SQLite file that cannot be opened, or a deleted experiment. Whatever MLflow or the
            network raises.
        """
        for noisy in ("alembic", "mlflow.tracking", "mlflow.store.model_registry"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # What these two say, the second with a page of traceback, the replayer reports once.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        if artifact_root is not None:
            prepare_store(artifact_root)
        check_store(uri)
        self._uri, self._run_id = uri, run_id
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiment_id = self._find_experiment(experiment, artifact_root)

    def open_run(self, stage: str | None, time_ms: int) -> str:
        """As Sink.open_run."""
        quoted = self._run_id.replace("'", "")
        role = f"tags.`bmojo.stage` = '{stage}'" if stage else "tags.`bmojo.role` = 'pipeline'"
        found = self._client.search_runs(
            [self._experiment_id],
            f"tags.`bmojo.run_id` = '{quoted}' and {role}",
            order_by=["attributes.start_time ASC"],
        )
        if found:
            return str(found[0].info.run_id)
        tags = {"bmojo.run_id": self._run_id, "bmojo.role": "stage" if stage else "pipeline"}
        if stage:
            tags |= {"bmojo.stage": stage, "mlflow.parentRunId": self.open_run(None, time_ms)}
        name = f"{self._run_id}/{stage}" if stage else self._run_id
        return str(
            self._client.create_run(self._experiment_id, start_time=time_ms, tags=tags, run_name=name).info.run_id
        )

    def has_run(self, run: str) -> bool:
        """Whether the run exists in the store and was not deleted there."""
        try:
            return bool(self._client.get_run(run).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def send(self, run: str, events: Sequence[Event], artifact_url: str | None) -> None:
        """As Sink.send: points with their own times in as few requests as allowed, or one event of another type."""
        try:
            if events[0]["event"] == "metrics":
                self._log_metrics(run, events)
                return
            (event,) = events
            handler = getattr(self, f"_apply_{event['event']}", None)
            if handler is None:
                raise UnsendableError(f"journal event of unknown type {event['event']!r}")
            handler(run, event, artifact_url)
        except Exception as error:
            if not is_unacceptable(error):
                raise
            raise UnsendableError(str(error)) from error

    def _log_metrics(self, mlflow_run: str, events: Sequence[Event]) -> None:
        points = [
            Metric(name[:_MAX_KEY], value, event["t"], event["step"])
            for event in events
            for name, value in event["values"].items()
        ]
        for start in range(0, len(points), _MAX_METRICS):
            self._client.log_batch(mlflow_run, metrics=points[start : start + _MAX_METRICS])

    def _apply_start(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._client.update_run(mlflow_run, status="RUNNING")
        self._set_tags(mlflow_run, {**event["tags"], "bmojo.status": "RUNNING"})

    def _apply_end(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._set_tags(mlflow_run, {**event["tags"], "bmojo.status": event["status"]})
        self._client.set_terminated(mlflow_run, _MLFLOW_STATUS[event["status"]], end_time=event["t"])

    def _apply_params(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        """MLflow's params cannot change: of one that did (resources, on a resume) the first value stays.

        The latest is in config.json.
        """
        known = self._client.get_run(mlflow_run).data.params
        params = [
            Param(name[:_MAX_KEY], _text(value)[:_MAX_PARAM_VALUE])
            for name, value in event["params"].items()
            if name[:_MAX_KEY] not in known
        ]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(mlflow_run, params=params[start : start + _MAX_PARAMS])

    def _apply_tags(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._set_tags(mlflow_run, event["tags"])

    def _apply_dataset(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        source = event["source"]
        scheme = source.partition("://")[0] if "://" in source else "local"
        dataset = Dataset(
            name=event["name"],
            digest=event["digest"][:_MAX_DIGEST],
            source_type=scheme,
            source=json.dumps({"uri": source}),
        )
        tags = [InputTag("mlflow.data.context", event["context"])]
        self._client.log_inputs(mlflow_run, datasets=[DatasetInput(dataset, tags=tags)])

    def _apply_json(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._client.log_dict(mlflow_run, event["content"], event["file"])

    def _apply_table(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        """As MlflowClient.log_table writes it, which would append the rows to those of an earlier delivery."""
        table = {"columns": event["columns"], "data": event["rows"]}
        self._client.log_dict(mlflow_run, table, event["file"])
        tags = self._client.get_run(mlflow_run).data.tags
        entry = {"path": event["file"], "type": "table"}
        logged = [one for one in json.loads(tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]")) if one != entry]
        self._set_tags(mlflow_run, {MLFLOW_LOGGED_ARTIFACTS: json.dumps([*logged, entry])})

    def _apply_artifact(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        self._upload(mlflow_run, event["path"], artifact_url)

    def _apply_model(self, mlflow_run: str, event: Event, artifact_url: str | None) -> None:
        """Register a model version for this run, once."""
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
            self._put(mlflow_run, local, path)
            return
        with tempfile.TemporaryDirectory(prefix="bmojo-") as scratch:  # a copy: the stage may be using its own
            local = Path(scratch) / PurePosixPath(path).name
            artifact.storage.get_tree(f"{artifact.relpath}/{path}", local)
            self._put(mlflow_run, local, path)

    def _put(self, mlflow_run: str, local: Path, path: str) -> None:
        if local.is_dir():
            self._client.log_artifacts(mlflow_run, str(local), artifact_path=path)
        else:
            parent = str(PurePosixPath(path).parent)
            self._client.log_artifact(mlflow_run, str(local), artifact_path=None if parent == "." else parent)

    def _set_tags(self, mlflow_run: str, tags: dict[str, str]) -> None:
        entities = [RunTag(name[:_MAX_KEY], value[:_MAX_TAG_VALUE]) for name, value in tags.items()]
        for start in range(0, len(entities), _MAX_PARAMS):
            self._client.log_batch(mlflow_run, tags=entities[start : start + _MAX_PARAMS])

    def _find_experiment(self, name: str, artifact_root: Path | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise UserError(deleted_experiment(str(redact(self._uri)), name, str(found.experiment_id)))
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_root.as_uri() if artifact_root else None))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._find_experiment(name, artifact_root)  # another driver was quicker


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
