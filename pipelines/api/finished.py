"""The finished stages of a run as nodes of its graph: with settings, inputs and results of their own types."""

from __future__ import annotations

from base.errors import UserError
from pipelines.api.results import stage_record
from pipelines.engine.graph import inputs_of, with_results
from pipelines.engine.records import FinishedStage
from pipelines.engine.runs import Run
from pipelines.engine.stage import AnyNode, StageNode
from pipelines.errors import ConfigError
from pipelines.loading import validate_pipeline


def finished_stages(run: Run) -> dict[str, AnyNode]:
    """Those whose results are there, as are those of all that they read, by name.

    Raises: UserError: another version of this program started the run, it has no history, or a record is damaged.
    """
    state = run.stored_state()
    try:
        config = validate_pipeline({**state.info.config, "storage": run.storage.url}, run.url)
    except ConfigError as error:
        raise UserError(f"{error}\nAnother version of this program started run {run.run_id}; run it again.") from None
    found: dict[str, AnyNode] = {}
    for node in config.graph():
        stage = state.stages.get(node.name)
        artifact = None if stage is None else run.artifact_of(stage)
        record = None if stage is None else stage_record(run, stage)
        if artifact is not None and record is not None and all(name in found for name in inputs_of(node)):
            result = FinishedStage(artifact, record).result(node.stage)
            found[node.name] = StageNode(node.name, node.stage, node.config, with_results(node, found), result)
    return found
