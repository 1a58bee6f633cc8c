"""The directed acyclic graph that the stages of a pipeline form through `needs`, each name in the role it has."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from pipelines.engine.stage import AnyNode, AnyStage, NamedInputs, Needs, StageConfig, StageInputs, StageNode
from pipelines.errors import ConfigError, FieldError


@dataclass(frozen=True)
class Role:
    """One field of a kind's StageInputs, or one name in the `needs` of a stage whose inputs are NamedInputs."""

    name: str
    kind: str | None  # of the stages in this role; None: any
    is_many: bool  # the field is a tuple
    is_optional: bool

    @property
    def wanted(self) -> str:
        """Number of stages it takes, in words."""
        if self.is_many:
            return "any number" if self.is_optional else "at least 1"
        return "at most 1" if self.is_optional else "exactly 1"

    @property
    def stages(self) -> str:
        """The stages it takes, in words."""
        return "stages" if self.kind is None else f"stages of kind {self.kind}"

    def accepts(self, count: int) -> bool:
        """Return True if so many stages may have this role."""
        return (count > 0 or self.is_optional) and (count < 2 or self.is_many)


def roles_of(inputs_type: type[StageInputs]) -> tuple[Role, ...]:
    """The roles of a kind's inputs, in the order of its fields."""
    types_of = get_type_hints(inputs_type)
    return tuple(_role(field, types_of[field.name]) for field in dataclasses.fields(inputs_type))


def _role(field: dataclasses.Field[Any], annotation: Any) -> Role:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    (read,) = (member for member in members if member is not type(None))
    is_many = get_origin(read) is tuple
    node = get_args(read)[0] if is_many else read
    if get_origin(node) is not StageNode:
        raise TypeError(f"{field.name}: found {annotation}, expected a type that StageInputs describes")
    return Role(field.name, get_args(node)[0].kind, is_many, is_optional=field.default is not MISSING)


def _roles_in(stage: AnyStage, needs: Needs) -> tuple[Role, ...]:
    """The roles of one stage: of its kind, or as it names them in `needs`."""
    if not issubclass(stage.inputs_type, NamedInputs):
        return roles_of(stage.inputs_type)
    by_name = needs if isinstance(needs, dict) else {name: name for name in needs}
    return tuple(
        Role(name, None, is_many=not isinstance(names, str), is_optional=False) for name, names in by_name.items()
    )


def stage_graph(configs: Mapping[str, StageConfig], kinds: Iterable[AnyStage]) -> list[AnyNode]:
    """The stages of a pipeline with what each reads, every one after those, otherwise in the order given.

    Args: configs: by the stages' names. kinds: all that there are.
    Raises: ConfigError: a kind is unknown, a stage needs itself or what is not there, there is a cycle, the wrong kinds
        or numbers of stages are needed, or settings do not fit those of an input.
    """
    stage_of = {stage.kind: stage for stage in kinds}
    for name, config in configs.items():
        if config.kind not in stage_of:
            raise ConfigError(
                f"stages.{name}.kind: there is no kind {config.kind!r}. The kinds: {', '.join(sorted(stage_of))}."
            )
    nodes: dict[str, AnyNode] = {}
    for name in topological_order({name: config.needed for name, config in configs.items()}):
        stage = stage_of[configs[name].kind]
        names = names_by_role(name, stage, configs)
        nodes[name] = StageNode(name, stage, configs[name], pick_inputs(stage, names, nodes))
    for name in configs:
        node = nodes[name]
        _check_min_workers(node)
        node.stage.check(name, node.config, node.inputs)
    return list(nodes.values())


def _check_min_workers(node: AnyNode) -> None:
    if node.config.resources.min_workers is not None and not node.stage.uses_ray_train:
        raise FieldError(
            ("stages", node.name, "resources", "min_workers"),
            f"found {node.config.resources.min_workers}, but only training workers work together: a {node.stage.kind} "
            "stage goes on with as many as there is room for. Leave it out.",
        )


def nodes_by_role(node: AnyNode) -> dict[Role, tuple[AnyNode, ...]]:
    """The stages that a stage reads."""
    inputs = node.inputs
    read_as = inputs.by_name if isinstance(inputs, NamedInputs) else vars(inputs)
    found = {}
    for role in _roles_in(node.stage, node.config.needs):
        read: Any = read_as[role.name]
        found[role] = read if role.is_many else () if read is None else (read,)
    return found


def inputs_of(node: AnyNode) -> tuple[str, ...]:
    """Names of the stages that a stage reads."""
    return tuple(read.name for nodes in nodes_by_role(node).values() for read in nodes)


def with_results(node: AnyNode, finished: Mapping[str, AnyNode]) -> StageInputs:
    """The inputs of a stage with the results of `finished`, which has all of them by name."""
    names = {role: [read.name for read in nodes] for role, nodes in nodes_by_role(node).items()}
    return pick_inputs(node.stage, names, finished)


def pick_inputs(stage: AnyStage, names: Mapping[Role, Sequence[str]], nodes: Mapping[str, AnyNode]) -> StageInputs:
    """The inputs of a stage of this kind, made of the named nodes."""
    found = {role: tuple(nodes[name] for name in names[role]) for role in names}
    read: dict[str, Any] = {
        role.name: several if role.is_many else next(iter(several), None) for role, several in found.items()
    }
    return stage.inputs_type(by_name=read) if issubclass(stage.inputs_type, NamedInputs) else stage.inputs_type(**read)


def names_by_role(name: str, stage: AnyStage, configs: Mapping[str, StageConfig]) -> dict[Role, tuple[str, ...]]:
    """Names in the `needs` of a stage by role: as said there, or as the kinds of the listed stages say.

    Raises: FieldError: a role is unknown, ambiguous, or has too few, too many or the wrong stages.
    """
    needs = configs[name].needs
    roles = _roles_in(stage, needs)
    if isinstance(needs, dict):
        found = _as_said(name, stage, needs, configs)
    elif issubclass(stage.inputs_type, NamedInputs):
        found = {role: (role.name,) for role in roles}
    else:
        found = _by_kind(name, stage, configs)
    for role in roles:
        count = len(found.setdefault(role, ()))
        if not role.accepts(count):
            said = isinstance(needs, dict) and role.name in needs
            where = "" if said or not isinstance(needs, dict) else f"role {role.name}: "
            raise FieldError(
                ("stages", name, "needs", role.name) if said else ("stages", name, "needs"),
                f"{where}found {count} {role.stages}, expected {role.wanted}. {_those_there(role.kind, name, configs)}",
            )
    return {role: found[role] for role in roles}


def _as_said(
    name: str, stage: AnyStage, needs: Mapping[str, str | tuple[str, ...]], configs: Mapping[str, StageConfig]
) -> dict[Role, tuple[str, ...]]:
    roles = {role.name: role for role in _roles_in(stage, dict(needs))}
    found = {}
    for said, names in needs.items():
        field = ("stages", name, "needs", said)
        if said not in roles:
            known = ", ".join(f"{role.name} ({role.wanted} of kind {role.kind})" for role in roles.values())
            known = known or "none, it reads no other stage"
            raise FieldError(field, f"a {stage.kind} stage has no role {said!r}. Its roles: {known}.")
        role = roles[said]
        found[role] = (names,) if isinstance(names, str) else names
        for needed in found[role]:
            if role.kind not in (None, configs[needed].kind):
                raise FieldError(
                    field,
                    f"{needed!r} is a {configs[needed].kind} stage, expected {role.wanted} of kind {role.kind}. "
                    f"{_those_there(role.kind, name, configs)}",
                )
    return found


def _by_kind(name: str, stage: AnyStage, configs: Mapping[str, StageConfig]) -> dict[Role, tuple[str, ...]]:
    roles = roles_of(stage.inputs_type)
    found: dict[Role, tuple[str, ...]] = {}
    for needed in configs[name].needed:
        kind = configs[needed].kind
        fitting = [role for role in roles if role.kind == kind]
        if not fitting:
            read = " and ".join(dict.fromkeys(str(role.kind) for role in roles)) or "no other stage"
            raise FieldError(
                ("stages", name, "needs"),
                f"{needed!r} is a {kind} stage; a {stage.kind} stage reads {read}. Take it out of `needs`.",
            )
        if len(fitting) > 1:
            raise FieldError(
                ("stages", name, "needs"),
                f"{needed!r} may be {' or '.join(role.name for role in fitting)}. Say which: "
                f"{{{fitting[0].name}: {needed}}}.",
            )
        found[fitting[0]] = (*found.get(fitting[0], ()), needed)
    return found


def _those_there(kind: str | None, name: str, configs: Mapping[str, StageConfig]) -> str:
    there = [other for other, config in configs.items() if kind in (None, config.kind) and other != name]
    return f"This pipeline's {kind or 'other'} stages: {', '.join(there) or 'none'}."


def topological_order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Stage names, each after those it needs, otherwise as in the mapping.

    Raises: FieldError: a stage needs itself, one that does not exist, the same one twice, or there is a cycle.
    """
    for name, needed in needs.items():
        for other in needed:
            if other == name:
                raise FieldError(("stages", name, "needs"), f"{name!r} needs itself. Take it out of its own `needs`.")
            if other not in needs:
                raise FieldError(
                    ("stages", name, "needs"),
                    f"there is no stage {other!r} in this pipeline. Its stages: {', '.join(needs)}.",
                )
        if len(set(needed)) != len(needed):
            raise FieldError(("stages", name, "needs"), f"{', '.join(needed)} names a stage twice. Name each once.")

    order: list[str] = []
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in path:
            cycle = " -> ".join((*path[path.index(name) :], name))
            raise FieldError(
                ("stages", name, "needs"),
                f"the stages wait for one another in a circle: {cycle}. Take one of these out of `needs`.",
            )
        for other in needs[name]:
            visit(other, (*path, name))
        done.add(name)
        order.append(name)

    for name in needs:
        visit(name, ())
    return order
