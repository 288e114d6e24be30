"""The single-device model and its batch. Knows nothing of ranks."""

from .batch import Document, PackedBatch, pack
from .config import PRESETS, FrozenSection, LanguageConfig, ModelConfig, TilingConfig, VisionConfig, YarnConfig
from .init import build_model
from .multimodal import PARTS, MultimodalModel, count_parameters

__all__ = [
    "PARTS",
    "PRESETS",
    "Document",
    "FrozenSection",
    "LanguageConfig",
    "ModelConfig",
    "MultimodalModel",
    "PackedBatch",
    "TilingConfig",
    "VisionConfig",
    "YarnConfig",
    "build_model",
    "count_parameters",
    "pack",
]
