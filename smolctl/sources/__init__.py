"""The MODEL argument of every command."""

from smolctl.sources.base import ModelSource, SourceKind, TensorHeader, TokenizerFiles, Weights
from smolctl.sources.open import open_source, open_weights

__all__ = [
    "ModelSource",
    "SourceKind",
    "TensorHeader",
    "TokenizerFiles",
    "Weights",
    "open_source",
    "open_weights",
]
