"""The content of a page about finished stages, of one run or of several."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from pipelines.engine.graph import nodes_by_role
from pipelines.engine.stage import AnyNode
from pipelines.redact import redact
from pipelines.stages.report.identity import RunIdentity, stages_table
from pipelines.stages.report.page import Content, StageSummary
from pipelines.stages.report.subjects import gather
from pipelines.stages.sections import Reported, Section


@dataclass(frozen=True)
class RunShare:
    """What of one run is on a page. `label`: what to call the run beside others; empty: it is alone."""

    run: RunIdentity | None
    nodes: Sequence[AnyNode]
    label: str = ""

    def named(self, name: str) -> str:
        """A stage's name, with that of the run if there are several."""
        return f"{self.label}/{name}" if self.label else name


def content_of(title: str, about: str, shares: Sequence[RunShare], baseline: str = "") -> Content:
    """What a page about these stages, and those that they read, is made of."""
    sections: list[Section] = []
    made: dict[str, tuple[str, AnyNode]] = {}  # by fingerprint: runs may share stages
    for share in shares:
        nodes = with_inputs(share.nodes)
        sections += _sections(share, nodes, told=made.keys())
        for node in nodes:
            made.setdefault(node.fingerprint, (share.named(node.name), node))
    return Content(
        title=title,
        about=about,
        runs=[share.run for share in shares if share.run is not None],
        sections=sections,
        made_by=stages_table(list(made.values())),
        stages=[
            StageSummary(name, node.stage.kind, node.fingerprint, redact(node.config.model_dump(mode="json")))
            for name, node in made.values()
        ],
        trained=[section.subject for section in sections if section.training is not None],
        baseline=baseline,
    )


def _sections(share: RunShare, nodes: Iterable[AnyNode], told: Collection[str]) -> list[Section]:
    """Those of the stages that have one, of the models that are needed, by their names on this page.

    Args: told: fingerprints of stages that other runs had already, whose data is not shown again.
    """
    needed = {node.name for node in share.nodes}
    found = [(node, node.stage.section(node)) for node in nodes if isinstance(node.stage, Reported)]
    shown = {subject.name for subject in gather([section for _, section in found], list(needed))}
    renamed = {name: share.named(name) if len(shown) > 1 else share.label or name for name in shown}
    sections = []
    for node, section in found:
        if section.subject and section.subject not in shown:
            continue  # what a shown model was made of
        data = [] if node.fingerprint in told else [replace(one, title=share.named(one.title)) for one in section.data]
        sections.append(replace(section, subject=renamed.get(section.subject, ""), data=data))
    return sections


def with_inputs(nodes: Iterable[AnyNode]) -> list[AnyNode]:
    """The nodes, each once and after all that it reads."""
    found: dict[str, AnyNode] = {}
    for node in nodes:
        read = (one for group in nodes_by_role(node).values() for one in group)
        found |= {one.name: one for one in (*with_inputs(read), node) if one.name not in found}
    return list(found.values())
