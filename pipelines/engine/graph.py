"""The directed acyclic graph that the stages' `needs` form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.errors import FieldError


def validate_graph(needs: Mapping[str, Sequence[str]]) -> None:
    """Check the graph given as stage name -> names it needs.

    Raises: FieldError: a stage needs itself, one that does not exist, the same one twice, or there is a cycle.
    """
    topological_order(needs)


def topological_order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Stage names, each after those it needs, otherwise as in the mapping. Raises as validate_graph."""
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
