"""Identity of a stage's result: a hash over everything that can change it, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

from pipelines.engine.stage import AnyStage, Content, StageConfig
from pipelines.redact import redact

SHORT_DIGITS = 8


class InputIdentity(BaseModel):
    """One input of a stage. Its name in this pipeline is kept for messages; only the stage's own name for it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    fingerprint: str
    named: str | None = None  # what the stage calls it, if its inputs are NamedInputs


class FingerprintParts(BaseModel):
    """Content of a hash, kept so that a later plan can say what changed. Secrets in it are masked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    code_version: int
    config: dict[str, Any]
    inputs: tuple[InputIdentity, ...]
    content: Content | None


class Fingerprint(BaseModel):
    """The hash in hexadecimal (SHA-256) and its parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    parts: FingerprintParts

    @property
    def short(self) -> str:
        """The first digits, as in directory names."""
        return self.digest[:SHORT_DIGITS]


def fingerprint_stage(
    stage: AnyStage, config: StageConfig, inputs: Mapping[str, Sequence[InputIdentity]], content: Content | None
) -> Fingerprint:
    """The fingerprint of a stage with this config, reading these inputs by kind, by kind and role, or by name.

    The order of inputs counts within a kind, where a stage can see it; their names do not, so renaming a stage leaves
    what reads it as it is.
    """
    hashed = {
        "kind": stage.kind,
        "code_version": stage.code_version,
        "config": config_that_matters(config) | config.settled(),
        "inputs": {kind: [one.fingerprint for one in identities] for kind, identities in inputs.items()},
        "content": content,
    }
    parts = FingerprintParts(
        kind=stage.kind,
        code_version=stage.code_version,
        config=redact(hashed["config"]),
        inputs=tuple(one for identities in inputs.values() for one in identities),
        content=content,
    )
    return Fingerprint(digest=digest_json(hashed), parts=parts)


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in one canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def config_that_matters(config: BaseModel) -> dict[str, Any]:
    """The config as JSON at any depth, without the fields marked NOT_IN_FINGERPRINT, or ADDED_LATER and not set."""
    matters: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value, extra = getattr(config, name), field.json_schema_extra
        affects = extra.get("affects_result", True) if isinstance(extra, Mapping) else True
        if affects is True or (affects == "unless default" and value != field.get_default(call_default_factory=True)):
            matters[name] = _plain(value)
    return matters


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return config_that_matters(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return to_jsonable_python(value)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names, those in lists by their number; other lists stay whole."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            flat.update(flatten(item, f"{name}."))
        elif isinstance(item, list | tuple) and item and all(isinstance(one, Mapping) for one in item):
            flat.update(flatten({str(number): one for number, one in enumerate(item)}, f"{name}."))
        else:
            flat[name] = item
    return flat


def differences(old: FingerprintParts, new: FingerprintParts) -> list[str]:
    """Changes from one fingerprint to another, a line each, `field: old -> new`."""
    changes = []
    if old.code_version != new.code_version:
        changes.append(f"code version of {new.kind}: {old.code_version} -> {new.code_version}")
    before, after = flatten(old.config), flatten(new.config)
    for name in [*after, *(name for name in before if name not in after)]:
        if name not in before:
            changes.append(f"{name}: (not there) -> {_shown(after[name])}")
        elif name not in after:
            changes.append(f"{name}: {_shown(before[name])} -> (not there)")
        elif before[name] != after[name]:
            changes.append(f"{name}: {_shown(before[name])} -> {_shown(after[name])}")
    return changes + _content_differences(old.content, new.content) + _input_differences(old.inputs, new.inputs)


def _content_differences(old: Content | None, new: Content | None) -> list[str]:
    if old == new:
        return []
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ["the content of the raw input"]
    changes = [name if name in old else f"{name}: new" for name in new if old.get(name) != new[name]]
    return changes + [f"{name}: gone" for name in old if name not in new]


def _input_differences(old: Sequence[InputIdentity], new: Sequence[InputIdentity]) -> list[str]:
    before = {stage_input.name: stage_input.fingerprint for stage_input in old}
    changes = []
    for stage_input in new:
        if stage_input.name not in before:
            if stage_input.fingerprint not in before.values():
                changes.append(f"input {stage_input.name}: new")
        elif before[stage_input.name] != stage_input.fingerprint:
            was, now = before[stage_input.name][:SHORT_DIGITS], stage_input.fingerprint[:SHORT_DIGITS]
            changes.append(f"input {stage_input.name}: {was} -> {now}")
    now_read = {stage_input.fingerprint for stage_input in new} | {stage_input.name for stage_input in new}
    changes += [f"input {was.name}: gone" for was in old if not {was.name, was.fingerprint} & now_read]
    if not changes and _by_kind(old) != _by_kind(new):
        changes.append("the order of the inputs")
    elif not changes and _named(old) != _named(new):
        changes.append("the names of the inputs")
    return changes


def _by_kind(inputs: Sequence[InputIdentity]) -> dict[str, list[str]]:
    by_kind: dict[str, list[str]] = {}
    for one in inputs:
        by_kind.setdefault(one.kind, []).append(one.fingerprint)
    return by_kind


def _named(inputs: Sequence[InputIdentity]) -> set[tuple[str | None, str]]:
    return {(one.named, one.fingerprint) for one in inputs}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
