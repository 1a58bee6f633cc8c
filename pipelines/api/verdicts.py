"""What the filters of a `tokenize` stage say of each document of its source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pydantic import ValidationError

from base.errors import UserError
from data.filters.screening import screened
from data.sources import plan_slices, slice_bytes_of
from pipelines.api.finding import require_kind
from pipelines.engine.runs import Run
from pipelines.engine.stage import Facts
from pipelines.stages.tasks import user_errors
from pipelines.stages.tokenize.screening import verdicts as verdicts_of
from pipelines.stages.tokenize.stage import TokenizeStage, TokenizeStageConfig

_SHOWN_CHARS = 200


class DocumentVerdict(Facts):
    """A document and what became of it."""

    document: str  # its name: path and byte, line or row
    kept: bool
    filter: str | None  # kind of the filter that left it out
    reason: str | None  # as it is counted
    why: str | None  # what was found in it
    text: str  # how it begins, as the filter saw it


def verdicts(run: Run, stage: str) -> Iterator[DocumentVerdict]:
    """Read the source of a stage again, from the beginning.

    If the stage is not finished, filters that compare documents read all of it before the first verdict.

    Raises: UserError: it is no tokenize stage, has no filters, or the text is not there any more.
    """
    info = run.info()
    require_kind(run, stage, TokenizeStage.kind)
    try:
        config = TokenizeStageConfig.model_validate(info.config["stages"][stage])
    except ValidationError as error:
        raise UserError(f"The settings of stage {stage} are of another version of this program: {error}") from error
    if not config.filters:
        raise UserError(f"Stage {stage} has no filters. Set `filters` in the pipeline file.")
    with user_errors(), contextlib.chdir(info.base_dir or "."):
        artifact = run.artifact_of(run.stored_state().stages[stage])
        found = (
            screened(plan_slices(config.source, slice_bytes_of(config)), config.filters)
            if artifact is None
            else verdicts_of(config, artifact)
        )
        for verdict in found:
            rejection = verdict.rejection
            yield DocumentVerdict(
                document=verdict.document.id,
                kept=rejection is None,
                filter=None if rejection is None else config.filters[verdict.filter].kind,
                reason=None if rejection is None else rejection.reason,
                why=None if rejection is None else rejection.why,
                text=verdict.document.text[:_SHOWN_CHARS],
            )
