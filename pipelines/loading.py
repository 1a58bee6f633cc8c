"""From a pipeline file to a validated PipelineConfig: YAML, model presets, overrides, readable errors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipelines.config import PipelineConfig
from pipelines.config_errors import FieldLines, describe_errors, suggest
from pipelines.errors import ConfigError

PRESETS_DIR = Path(__file__).resolve().parent.parent / "configs" / "models"


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read, override and validate a pipeline file.

    Args:
        overrides: `field.path=value` with YAML values. A path that begins with a stage's name is short for
            `stages.<that stage>...`: `train.lr=1e-3`.
    Raises: ConfigError: naming the file, the line, the field, what was found and what was expected.
    """
    path = Path(path)
    raw, lines = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override)
    _resolve_presets(raw, path)
    return validate_pipeline(raw, str(path), lines)


def validate_pipeline(raw: dict[str, Any], origin: str, lines: FieldLines | None = None) -> PipelineConfig:
    """Validate an already parsed pipeline; `origin` and `lines` say in errors where a field stands."""
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, PipelineConfig, raw, origin, lines or FieldLines(None))) from None


def model_presets() -> list[str]:
    """Names that `model:` accepts."""
    return sorted(file.stem for file in PRESETS_DIR.glob("*.yaml"))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML allows a key twice and PyYAML keeps the last one in silence: a lost setting."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor` may be overridden by the keys beside it
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> tuple[dict[str, Any], FieldLines]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file. Pipeline files here: {', '.join(near) or 'none'}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text ({error}). Give the path of a pipeline's YAML file."
        ) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.load(text, Loader=_UniqueKeyLoader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}. Mend this line.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: found {type(raw).__name__} at the top, expected a mapping with `name` and `stages`."
        )
    return raw, FieldLines(root)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path_text, equals, value_text = override.partition("=")
    keys = path_text.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected field.path=value, such as train.lr=1e-3.")
    stages = raw.get("stages")
    if isinstance(stages, dict) and keys[0] in stages:
        keys = ["stages", *keys]
    elif keys[0] not in PipelineConfig.model_fields:
        known = [*(stages if isinstance(stages, dict) else ()), *PipelineConfig.model_fields]
        raise ConfigError(
            f"override {override!r}: {keys[0]!r} is neither a stage nor a field.{suggest(keys[0], known)}"
        )
    try:
        value = yaml.safe_load(value_text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}.") from None
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node.get(key), str) and key == "model":  # `model: preset` becomes a mapping to be overridden
            node[key] = {"preset": node[key]}
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(keys[: depth + 1])} is not a mapping; give it a whole value instead."
            )
    node[keys[-1]] = value


def _resolve_presets(raw: dict[str, Any], path: Path) -> None:
    """Replace `model: NAME` and `model: {preset: NAME, ...}` by the preset's fields, the file's own on top."""
    stages = raw.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        model = stage.get("model") if isinstance(stage, dict) else None
        if isinstance(model, str):
            stage["model"] = _preset(model, f"{path}: stages.{name}.model")
        elif isinstance(model, dict) and "preset" in model:
            own = {key: value for key, value in model.items() if key != "preset"}
            stage["model"] = _preset(str(model["preset"]), f"{path}: stages.{name}.model.preset") | own


def _preset(name: str, where: str) -> dict[str, Any]:
    file = PRESETS_DIR / f"{name}.yaml"
    if name not in model_presets():
        raise ConfigError(
            f"{where}: no model preset {name!r}.{suggest(name, model_presets())} Presets are in {PRESETS_DIR}."
        )
    return dict(copy.deepcopy(_read_yaml(file)[0]))


def pipeline_schema() -> dict[str, Any]:
    """JSON schema of a pipeline file as users write it: `model` may be a preset's name, or a preset and changes."""
    schema = PipelineConfig.model_json_schema()
    model = schema["$defs"]["ModelConfig"]
    preset = {"enum": model_presets(), "description": "A preset of configs/models; other fields of `model` change it."}
    model["properties"] = {"preset": preset, **model["properties"]}
    train = schema["$defs"]["TrainStageConfig"]["properties"]
    train["model"] = {**train["model"], "anyOf": [{"$ref": "#/$defs/ModelConfig"}, preset]}
    train["model"].pop("$ref", None)
    return schema
