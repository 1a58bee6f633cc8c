"""A Hub that cannot be reached stops a stage as a fault of the network, which may pass, and not as the user's."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from pipelines.errors import InfrastructureError
from pipelines.stages.tokenize.stage import TokenizeStage, TokenizeStageConfig
from pipelines.stages.tokenizer.stage import TokenizerStage, TokenizerStageConfig

SOURCE: Any = {"kind": "huggingface", "dataset": "owner/name"}


@pytest.fixture(autouse=True)
def _nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")


def test_while_planning() -> None:
    message = "source.dataset=owner/name: .*The Hub cannot be reached now"
    with pytest.raises(InfrastructureError, match=message):
        TokenizerStage().content_identity(TokenizerStageConfig(kind="tokenizer", source=SOURCE))
    with pytest.raises(InfrastructureError, match=message):
        TokenizeStage().content_identity(TokenizeStageConfig(kind="tokenize", source=SOURCE, seq_len=64))
