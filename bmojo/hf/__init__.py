"""Hugging Face: directories that transformers and lm-eval read with trust_remote_code, and the way back.

Writing and reading such directories needs no transformers; bmojo.hf.modeling, the class they name, does.
"""

from bmojo.hf.exporting import export_to_hf, import_from_hf

__all__ = ["export_to_hf", "import_from_hf"]
