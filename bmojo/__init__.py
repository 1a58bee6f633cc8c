"""The B'MOJO model family (arXiv:2407.06324)."""

from typing import TYPE_CHECKING, Any

from bmojo.config import ModelConfig

if TYPE_CHECKING:
    from bmojo.model import BMojoLM, LMOutput, float32_names, to_bfloat16

__all__ = ["BMojoLM", "LMOutput", "ModelConfig", "float32_names", "to_bfloat16"]


def __getattr__(name: str) -> Any:
    """The rest on first use: settings can be read without torch, whose import takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bmojo import model

    return getattr(model, name)
