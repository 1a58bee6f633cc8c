"""What tests of the model share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def hf_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep transformers' copies of model code out of the user's cache."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    cache = str(tmp_path_factory.mktemp("hf_modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(hub, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield
