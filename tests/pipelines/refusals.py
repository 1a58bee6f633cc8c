"""What a user reads when a pipeline file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import ConfigError
from pipelines.loading import load_pipeline


def refusal(file: Path, *overrides: str) -> str:
    """The message of the error that loading the file with these overrides raises."""
    with pytest.raises(ConfigError) as refused:
        load_pipeline(file, overrides)
    return str(refused.value)
