"""The work of the measure `samples`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.stages.evaluate.language_model import Drawing
from pipelines.stages.evaluate.measures.figures import text_array, texts_of
from pipelines.stages.evaluate.measures.measure import Measured
from pipelines.stages.evaluate.results import MeasureResult, SampleText
from pipelines.stages.evaluate.sampling import continue_texts

if TYPE_CHECKING:
    from pipelines.stages.evaluate.host import Host
    from pipelines.stages.evaluate.measures.measure import TaskResult


@dataclass(frozen=True)
class ContinueTexts:
    """Continue the prompts side by side. `drawing`: the fields of a Drawing."""

    prompts: tuple[str, ...]
    drawing: Mapping[str, Any]

    def run(self, host: Host) -> TaskResult:
        """Returns: `texts`, a text_array."""
        texts = continue_texts(host.generator, host.tokenizer, self.prompts, Drawing(**self.drawing))
        return {"texts": text_array(texts)}


def measured(name: str, prompts: Sequence[str], results: Mapping[str, TaskResult]) -> Measured:
    """Prompts with their texts."""
    texts = [text for result in results.values() for text in texts_of(result["texts"])]
    samples = tuple(SampleText(prompt=prompt, text=text) for prompt, text in zip(prompts, texts, strict=True))
    return Measured(MeasureResult(name=name, kind="samples", unit="text", num_units=len(samples), samples=samples))
