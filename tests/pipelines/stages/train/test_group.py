"""How many workers train together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from data.streaming import StreamOrder, TokenStream, Worker
from pipelines.stages.tokenize.reading import token_split
from pipelines.stages.train.config import TrainStageConfig
from tests.pipelines.stages.train.training import Tokens

MakeConfig = Callable[..., TrainStageConfig]


def ids_of_step(config: TrainStageConfig, tokens: Tokens, step: int) -> list[tuple[int, ...]]:
    """The samples of a global batch, over all workers, as the workers' streams give them."""
    found: list[tuple[int, ...]] = []
    for rank in range(config.resources.num_workers):
        with TokenStream(
            [token_split(tokens.artifact, "train")],
            micro_batch_size=config.worker_micro_batch_size,
            global_batch_size=config.global_batch_size,
            order=StreamOrder(config.seed, num_paths=config.data.paths),
            worker=Worker(rank, config.resources.num_workers),
        ) as stream:
            places = stream.places(step)
            assert len(places) == config.accumulation_steps * config.worker_micro_batch_size
            found += [tuple(place) for place in places]
    return sorted(found)


@pytest.mark.parametrize("paths", [1, 4])
def test_every_size_of_the_group_reads_the_same_samples_in_every_step(
    train_config: MakeConfig, tokens: Tokens, paths: int
) -> None:
    config = train_config(
        global_batch_size=24, micro_batch_size=5, data={"paths": paths}, resources={"num_workers": 12, "min_workers": 1}
    )
    assert config.group_sizes == [1, 2, 3, 4, 6, 8, 12]
    for step in range(4):
        expected = ids_of_step(config.with_workers(1), tokens, step)
        for size in config.group_sizes[1:]:
            assert ids_of_step(config.with_workers(size), tokens, step) == expected
