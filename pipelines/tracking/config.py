"""The `tracking` part of a pipeline file: one tracker, or a list of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter

from pipelines.errors import ConfigError, FieldError
from pipelines.storage import Storage
from pipelines.tracking.mlflow.target import MlflowConfig
from pipelines.tracking.sink import SinkConfig, Target
from pipelines.tracking.tensorboard import TensorboardConfig

SINKS: tuple[type[SinkConfig], ...] = (MlflowConfig, TensorboardConfig)
"""Every kind of tracker."""

if TYPE_CHECKING:
    TrackingConfig = SinkConfig | tuple[SinkConfig, ...]
else:

    def _form(value: Any) -> str:
        """The tag of a form: a list, or the kind of the only tracker."""
        if isinstance(value, list | tuple):
            return "tuple"
        return str(value.get("kind", "mlflow") if isinstance(value, dict) else getattr(value, "kind", "mlflow"))

    def _not_empty(trackers: tuple[SinkConfig, ...]) -> tuple[SinkConfig, ...]:
        if not trackers:
            raise FieldError(("tracking",), "found an empty list, expected at least one tracker.")
        return trackers

    _ANY = Annotated[Union[SINKS], Field(discriminator="kind")]  # noqa: UP007 (a union of a tuple has no `|` form)
    _LIST = Annotated[tuple[_ANY, ...], AfterValidator(_not_empty), Tag("tuple")]
    _ALONE = [Annotated[sink, Tag(sink.model_fields["kind"].default)] for sink in SINKS]
    TrackingConfig = Annotated[Union[(*_ALONE, _LIST)], Field(discriminator=Discriminator(_form))]


def trackers_of(tracking: TrackingConfig) -> tuple[SinkConfig, ...]:
    """The trackers: a mapping alone is a list of one."""
    return tracking if isinstance(tracking, tuple) else (tracking,)


def targets_of(tracking: TrackingConfig, storage: Storage) -> tuple[Target, ...]:
    """Where the runs of a storage are shown. Raises ConfigError: no such place can exist, or two are the same."""
    targets = tuple(tracker.target(storage) for tracker in trackers_of(tracking))
    for number, target in enumerate(targets):
        if target.identity in [other.identity for other in targets[:number]]:
            raise ConfigError(f"tracking.{number}: {target.where} is in the list twice. Remove one of the two.")
    return targets


def default_targets(storage: Storage) -> tuple[Target, ...]:
    """A target of every kind, as it is without any setting. Raises ConfigError as targets_of."""
    return tuple(sink.model_validate({}).target(storage) for sink in SINKS)


def stored_targets(config: dict[str, Any], storage: Storage) -> tuple[Target, ...]:
    """The targets of the configuration that a run was stored with. Raises ConfigError as targets_of."""
    return targets_of(TypeAdapter(TrackingConfig).validate_python(config["tracking"]), storage)
