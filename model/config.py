"""Sizes of the model. The same classes build the digits model and the 3B one."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator


class VisionConfig(BaseModel):
    """A SigLIP2-style vision tower over square tiles."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_layers: int = 27
    """Transformer blocks."""
    width: int = 1152
    """Hidden size."""
    num_heads: int = 16
    """Attention heads."""
    ffn: int = 4304
    """Hidden size of the MLP."""
    patch: int = 14
    """Side of a patch in pixels."""
    tile: int = 378
    """Side of a tile in pixels, a multiple of patch."""
    merge: int = 2
    """merge x merge patches become one token of the language model; a grid that does not divide is padded with zeros."""
    norm_eps: float = 1e-6
    """Epsilon of LayerNorm."""

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.width % self.num_heads:
            raise ValueError(f"vision width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.tile % self.patch:
            raise ValueError(f"vision tile {self.tile} is not a multiple of patch {self.patch}")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that a tile takes in the language model."""
        return (-(-self.grid // self.merge)) ** 2


class LanguageConfig(BaseModel):
    """A Llama-style decoder: grouped-query attention, RoPE, RMSNorm, SwiGLU."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_layers: int = 28
    """Transformer blocks."""
    width: int = 2560
    """Hidden size."""
    num_heads: int = 20
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads; num_heads is a multiple."""
    head_dim: int = 128
    """Size of a head, even."""
    ffn: int = 8192
    """Hidden size of SwiGLU."""
    vocabulary: int = 100_096
    """Rows of the embedding; at least the tokenizer's size."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2.5)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    tie_embeddings: bool = True
    """The head is the embedding."""

    @model_validator(mode="after")
    def _check(self) -> LanguageConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"language num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"language head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        return self


class ModelConfig(BaseModel):
    """The whole model: vision tower, projector, decoder."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    vision: VisionConfig = VisionConfig()
    """The vision tower."""
    language: LanguageConfig = LanguageConfig()
    """The decoder."""
    projector_width: int | None = None
    """Hidden size of the projector's two-layer MLP; the language width when not given."""
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether the tokens of one image see each other, or only those before them."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""


# The totals are published (2.9B; SigLIP2 so400m tower, 2x2 merge, two-layer projector; 2.5B language model). The sizes of the
# language model are not: layers, width, heads and FFN here are our own choice that meets the total. The vocabulary is that of the
# last open model of the family, BlueLM-7B.
PRESETS = {"bluelm_3b": ModelConfig()}
