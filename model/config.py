"""Sizes of the model. The same classes build the digits model and the 3B one."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from smalt.kernels import YarnScaling


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


class YarnConfig(FrozenSection):
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2): rotary positions for documents longer than those trained on."""

    factor: float = Field(ge=1)
    """By how much the slow dims are slowed down: longest document over original_length. 1 is plain RoPE."""
    original_length: int = Field(ge=1)
    """Longest document that the weights were trained on without it, in tokens."""
    beta_fast: float = Field(32.0, gt=0)
    """Dims that turn more often than this within original_length are kept as they are."""
    beta_slow: float = Field(1.0, gt=0)
    """Dims that turn less often than this are slowed down by the whole factor; those between, by a linear ramp."""
    attention_factor: float | None = Field(None, gt=0)
    """Factor of queries and keys; 0.1 ln(factor) + 1 when not given."""
    truncate: bool = True
    """The ramp begins and ends at whole dims, as in most checkpoints."""

    @model_validator(mode="after")
    def _check(self) -> YarnConfig:
        if self.beta_slow > self.beta_fast:
            raise ValueError(f"yarn beta_slow {self.beta_slow} is above beta_fast {self.beta_fast}")
        return self

    @property
    def scaling(self) -> YarnScaling:
        """What the rotary table is scaled by."""
        return YarnScaling(**self.model_dump())


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
    yarn: YarnConfig | None = None
    """Scaling of the rotary frequencies; none when not given."""
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


class TilingConfig(FrozenSection):
    """AnyRes: an image becomes up to max_rows x max_columns tiles, and a thumbnail where it becomes more than one."""

    max_rows: int = Field(4, ge=1, le=64)
    """Most rows of tiles."""
    max_columns: int = Field(4, ge=1, le=64)
    """Most columns of tiles."""
    alpha: float = Field(0.1, ge=0, lt=1)
    """Share of an image's pixels that a grid may lose, for one that leaves less of its area empty."""


class ModelConfig(FrozenSection):
    """The whole model: vision tower, projector, decoder."""

    vision: VisionConfig = VisionConfig()
    """The vision tower."""
    tiling: TilingConfig = TilingConfig()
    """How images are cut into tiles."""
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
#
# bluelm_7b is a teacher to prune it from. That the paper's has 7B parameters is published; its sizes are not, and these too are our
# own: heads of the same size in as many groups, so that query heads leave a group and none changes to another.
PRESETS = {
    "bluelm_3b": ModelConfig(),
    "bluelm_7b": ModelConfig(language=LanguageConfig(num_layers=32, width=4096, num_heads=32, num_kv_heads=4, ffn=14_336)),
}
