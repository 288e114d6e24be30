"""Sizes of the model. The same classes build the digits model and the 3B one."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FrozenSection(BaseModel):
    """A section of the config that does not change. Unknown keys and floats that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class VisionConfig(FrozenSection):
    """A SigLIP2-style vision tower over square tiles."""

    num_layers: int = Field(27, ge=1)
    """Transformer blocks."""
    width: int = Field(1152, ge=1)
    """Hidden size."""
    num_heads: int = Field(16, ge=1)
    """Attention heads."""
    ffn: int = Field(4304, ge=1)
    """Hidden size of the MLP."""
    patch: int = Field(14, ge=1)
    """Side of a patch in pixels."""
    tile: int = Field(378, ge=1)
    """Side of a tile in pixels, a multiple of patch."""
    merge: int = Field(2, ge=1)
    """merge x merge patches become one token of the language model; a grid that does not divide is padded with zeros."""
    norm_eps: float = Field(1e-6, gt=0)
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


class LanguageConfig(FrozenSection):
    """A Llama-style decoder: grouped-query attention, RoPE, RMSNorm, SwiGLU."""

    num_layers: int = Field(28, ge=1)
    """Transformer blocks."""
    width: int = Field(2560, ge=1)
    """Hidden size."""
    num_heads: int = Field(20, ge=1)
    """Query heads."""
    num_kv_heads: int = Field(4, ge=1)
    """Key and value heads; num_heads is a multiple."""
    head_dim: int = Field(128, ge=2)
    """Size of a head, even."""
    ffn: int = Field(8192, ge=1)
    """Hidden size of SwiGLU."""
    vocabulary: int = Field(100_096, ge=1)
    """Rows of the embedding; at least the tokenizer's size."""
    rope_theta: float = Field(1_000_000.0, gt=1)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(1e-6, gt=0)
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


class ModelConfig(FrozenSection):
    """The whole model: vision tower, projector, decoder."""

    vision: VisionConfig = VisionConfig()
    """The vision tower."""
    language: LanguageConfig = LanguageConfig()
    """The decoder."""
    projector_width: int | None = Field(None, ge=1)
    """Hidden size of the projector's two-layer MLP; the language width when not given."""
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether the tokens of one image see each other, or only those before them."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""


# The totals are published (2.9B; SigLIP2 so400m tower, 2x2 merge, two-layer projector; 2.5B language model). The sizes of the
# language model are not: layers, width, heads and FFN here are our own choice that meets the total. The vocabulary is that of the
# last open model of the family, BlueLM-7B.
PRESETS = {"bluelm_3b": ModelConfig()}
