"""The single-device model and its batch. Knows nothing of ranks."""

from .batch import Document, PackedBatch, pack
from .config import PRESETS, FrozenSection, LanguageConfig, ModelConfig, VisionConfig
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
    "VisionConfig",
    "build_model",
    "count_parameters",
    "pack",
]
