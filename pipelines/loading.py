"""From a pipeline file to a validated PipelineConfig: YAML, overrides, foreach, model presets, readable errors."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from base.names import suggest
from bmojo import ModelConfig
from pipelines.config import PipelineConfig
from pipelines.config_errors import FieldOrigins, describe_errors, shown
from pipelines.engine.graph import roles_of
from pipelines.engine.stage import AnyStage, NamedInputs
from pipelines.errors import ConfigError, FieldError
from pipelines.foreach.expansion import expand_foreach, template_of
from pipelines.foreach.schema import allow_foreach, entry_of_needs
from pipelines.packages import PRESETS_DIR
from pipelines.stages import STAGES

MAX_DEPTH = 40  # levels of a pipeline file; its fields need 8
_GATHER = re.compile(r"[\w-]+\[(\*|[^\[\]]*=[^\[\]]*)\]")  # train[*], which YAML's [...] and {...} do not allow


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read, override and validate a pipeline file.

    Args:
        overrides: `field.path=value` with YAML values. A path that begins with a stage's name is short for
            `stages.<that stage>...`: `train.lr=1e-3`; where a stage is named as a field at the top, the field is meant.
            A number names an entry of a list: `train.betas.0=0.8`. Stages are meant as they are written, before
            `foreach` makes copies of them.
    Raises: ConfigError: naming the override or the file and line, the field, what was found and what was expected.
    """
    path = Path(path)
    if "=" in str(path) and not path.exists() and any(Path(other).is_file() for other in overrides):
        raise ConfigError(f"found {str(path)!r} where the pipeline file is expected: overrides come after the file.")
    raw, origins = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override, origins)
    _check_text(raw, (), origins)
    try:
        raw = expand_foreach(raw, origins)
    except FieldError as error:
        raise ConfigError(origins.describe(error.field, error.problem)) from None
    _resolve_presets(raw, origins)
    return validate_pipeline(raw, str(path), origins, path.parent)


def validate_pipeline(
    raw: dict[str, Any], origin: str, origins: FieldOrigins | None = None, folder: Path | None = None
) -> PipelineConfig:
    """Validate an already parsed pipeline.

    Args:
        origin: its file. origins: say in errors where a field comes from.
        folder: where it lies, if modules of the user's may lie beside it.
    Raises: ConfigError: as load_pipeline.
    """
    try:
        return PipelineConfig.model_validate(raw, context={"pipeline_folder": str(folder)} if folder else None)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, PipelineConfig, origins or FieldOrigins(origin))) from None


def model_presets() -> list[str]:
    """Names that `model:` accepts."""
    return sorted(file.stem for file in PRESETS_DIR.glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The fields that a preset sets."""
    return dict(copy.deepcopy(_read_yaml(PRESETS_DIR / f"{name}.yaml")[0]))


class _Loader(yaml.SafeLoader):
    """YAML for settings: each key is a name and stands once, and whatever cannot be read is an error with its line.

    YAML itself allows a key twice, of which PyYAML keeps the last without a word: a lost setting.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor` may be overridden by the keys beside it
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _problem(key_node, f"a key must be a name, found {shown(key)} (quotes make it text)")
            if key in seen:
                raise _problem(key_node, f"key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            # 2026-13-45 is a date without such a month, `!!int x` no number, and so on
            raise _problem(node, f"{shown(node.value)} cannot be read as {node.tag.rpartition(':')[2]}") from error

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Text with the halves of escaped pairs joined: an emoji may be written as \\ud83d\\ude00."""
        text = super().construct_scalar(node)
        has_halves = any(map(_is_unusable, text))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") if has_halves else text


def _problem(node: yaml.Node, text: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The value and the tree it comes from. Raises YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            mark: Any = event.start_mark  # the stubs have two classes for it
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels deep", mark)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        return (None if root is None else loader.construct_document(root)), root
    except RecursionError:
        raise yaml.YAMLError("an anchor that contains itself") from None
    finally:
        loader.dispose()


def _yaml_problem(error: yaml.YAMLError, text: str) -> tuple[int | None, str]:
    """The line (from 1) and one sentence."""
    if isinstance(error, yaml.reader.ReaderError):
        return text.count("\n", 0, error.position) + 1, f"character {chr(int(error.character))!r} is not allowed"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "cannot be read"
        line = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
        if gather := _GATHER.search(line):
            problem += f'. In a list or mapping with brackets, it needs quotes: "{gather[0]}"'
        return mark.line + 1 if mark else None, problem
    return None, " ".join(str(error).split())


def _read_yaml(path: Path) -> tuple[dict[str, Any], FieldOrigins]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file. Pipeline files here: {', '.join(near) or 'none'}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text ({error}). Give the path of a pipeline's YAML file."
        ) from None
    try:
        raw, root = _parse_yaml(text)
    except yaml.YAMLError as error:
        line, problem = _yaml_problem(error, text)
        where = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"{where}: not valid YAML: {problem}. Correct this line.") from None
    if not isinstance(raw, dict):
        found = "an empty file" if raw is None else "a list" if isinstance(raw, list) else shown(raw)
        raise ConfigError(f"{path}: found {found}, expected a mapping with `name` and `stages`.")
    return raw, FieldOrigins(str(path), root)


def _apply_override(raw: dict[str, Any], override: str, origins: FieldOrigins) -> None:
    path_text, equals, value_text = override.partition("=")
    keys = path_text.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected field.path=value, such as train.lr=1e-3.")
    stages = raw.get("stages")
    if keys[0] not in PipelineConfig.model_fields:
        if not isinstance(stages, dict) or keys[0] not in stages:
            _refuse_copy(stages, keys, override)
            known = [*(stages if isinstance(stages, dict) else ()), *PipelineConfig.model_fields]
            hint = " Overrides are written without dashes." if keys[0].startswith("-") else ""
            raise ConfigError(
                f"override {override!r}: {keys[0]!r} is neither a stage nor a field.{hint or suggest(keys[0], known)}"
            )
        keys = ["stages", *keys]
    if keys[0] == "stages" and len(keys) > 2:
        _refuse_copy(stages, keys[1:], override)
        keys = _foreach_keys(stages, keys)
    try:
        value, _ = _parse_yaml(value_text)
    except yaml.YAMLError as error:
        problem = _yaml_problem(error, value_text)[1]
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {problem}.") from None
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        at = _key_in(node, key, override, keys[:depth])
        if key == "model" and isinstance(node.get(key), str):  # `model: preset` becomes a mapping to be overridden
            node[key] = {"preset": node[key]}
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[at]
    node[_key_in(node, keys[-1], override, keys[:-1])] = value
    origins.add_override(keys, override)


def _refuse_copy(stages: Any, keys: Sequence[str], override: str) -> None:
    """Raises ConfigError: the override is of a copy that `foreach` makes."""
    if (template := template_of(stages, keys[0])) not in (None, keys[0]):
        raise ConfigError(
            f"override {override!r}: {keys[0]!r} is a copy of stage {template!r}. Override the stage, and with it all "
            f"of its copies: {'.'.join((str(template), *keys[1:]))}=...; or the values: {template}.foreach."
        )


def _foreach_keys(stages: Any, keys: list[str]) -> list[str]:
    """The keys of an override with those that make up a field of `foreach` joined: model.window_size is one key."""
    if keys[2:3] != ["foreach"]:
        return keys
    stage = stages.get(keys[1]) if isinstance(stages, dict) else None
    foreach = stage.get("foreach") if isinstance(stage, dict) else None
    there = foreach if isinstance(foreach, dict) else {}
    ends = (end for end in range(len(keys), 3, -1) if ".".join(keys[3:end]) in there)
    end = next(ends, len(keys))
    return [*keys[:3], ".".join(keys[3:end]), *keys[end:]] if keys[3:] else keys


def _key_in(node: Any, key: str, override: str, path: Sequence[str]) -> str | int:
    """The key of a mapping, or the index of a list, that `key` stands for. Raises ConfigError: `node` has no such."""
    if isinstance(node, dict):
        return key
    if isinstance(node, list) and key.isdecimal() and key.isascii() and int(key[:9]) < len(node):
        return int(key)
    where = ".".join(path)
    if isinstance(node, list):
        raise ConfigError(
            f"override {override!r}: {where} is a list of {len(node)}; expected the number of an entry, from 0."
        )
    also = f" The stage of that name is stages.{where}." if len(path) == 1 else ""
    raise ConfigError(f"override {override!r}: {where} is not a mapping; give it a whole value instead.{also}")


def _check_text(value: Any, path: tuple[str | int, ...], origins: FieldOrigins, depth: int = 0) -> None:
    """Refuse text that no file, store or tokenizer can hold. Raises ConfigError naming the field and where it is."""
    if depth > MAX_DEPTH:
        return  # a list that contains itself; validation refuses it
    if isinstance(value, str) and (bad := next((char for char in value if _is_unusable(char)), None)) is not None:
        what = "a NUL character" if bad == "\0" else f"half of a character ({ascii(bad)[1:-1]}, a lone surrogate)"
        raise ConfigError(origins.describe(path, f"holds {what}, which is not text. Remove it."))
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        if isinstance(key, str) and any(map(_is_unusable, key)):
            raise ConfigError(f"{origins.of(path)}: the key {key!r} holds a character that is not text. Remove it.")
        _check_text(inner, (*path, key), origins, depth + 1)


def _is_unusable(character: str) -> bool:
    return character == "\0" or "\ud800" <= character <= "\udfff"


def _kinds_of_models() -> set[str]:
    """Kinds of stages whose `model` is an architecture."""
    fields = {stage.kind: stage.config_type.model_fields.get("model") for stage in STAGES}
    return {kind for kind, field in fields.items() if field is not None and field.annotation is ModelConfig}


def _resolve_presets(raw: dict[str, Any], origins: FieldOrigins) -> None:
    """Replace `model: NAME` and `model: {preset: NAME, ...}` by the preset's fields, the file's own on top."""
    stages = raw.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        model = stage.get("model") if isinstance(stage, dict) and stage.get("kind") in _kinds_of_models() else None
        if isinstance(model, str):
            stage["model"] = _preset(model, ("stages", name, "model"), origins)
        elif isinstance(model, dict) and "preset" in model:
            own = {key: value for key, value in model.items() if key != "preset"}
            stage["model"] = _preset(model["preset"], ("stages", name, "model", "preset"), origins) | own


def _preset(name: Any, field: Sequence[str], origins: FieldOrigins) -> dict[str, Any]:
    if name not in model_presets():
        near = suggest(str(name), model_presets())
        raise ConfigError(
            origins.describe(field, f"no model preset {shown(name)}.{near} Presets are in {PRESETS_DIR}.")
        )
    return read_preset(name)


def pipeline_schema() -> dict[str, Any]:
    """JSON schema of a pipeline file as users write it: with presets, roles of each kind's inputs, and `foreach`.

    `model` may be a preset's name, or a preset and changes.
    """
    schema = PipelineConfig.model_json_schema()
    model = schema["$defs"]["ModelConfig"]
    preset = {"enum": model_presets(), "description": "A preset of configs/models; other fields of `model` change it."}
    model["properties"] = {"preset": preset, **model["properties"]}
    for stage in STAGES:
        fields = schema["$defs"][stage.config_type.__name__]["properties"]
        if stage.kind in _kinds_of_models():
            fields["model"] = {**fields["model"], "anyOf": [{"$ref": "#/$defs/ModelConfig"}, preset]}
            fields["model"].pop("$ref", None)
        fields["needs"] = _schema_of_needs(stage, fields["needs"])
        allow_foreach(schema["$defs"][stage.config_type.__name__])
    return schema


def _schema_of_needs(stage: AnyStage, needs: dict[str, Any]) -> dict[str, Any]:
    entry = entry_of_needs()
    entries = {"type": "array", "items": entry}
    one_or_more = {"anyOf": [entry, entries]}
    if issubclass(stage.inputs_type, NamedInputs):
        return {**needs, "anyOf": [entries, {"type": "object", "additionalProperties": one_or_more}]}
    by_role = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            role.name: {
                "description": f"{role.wanted.capitalize()} of kind {role.kind}.",
                **(one_or_more if role.is_many else entry),
            }
            for role in roles_of(stage.inputs_type)
        },
    }
    return {**needs, "anyOf": [entries, by_role]}
