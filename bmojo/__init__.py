"""The B'MOJO model family (arXiv:2407.06324) in plain PyTorch."""

from bmojo.config import ModelConfig
from bmojo.model import BMojoLM, LMOutput, is_ssm_param

__all__ = ["BMojoLM", "LMOutput", "ModelConfig", "is_ssm_param"]
