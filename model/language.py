"""The decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU; tied or untied head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smalt.kernels import AttentionPlan, attention, attention_plan, decode_attention, rms_norm, rotary, rotary_table, swiglu

from .config import LanguageConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """The norm of x; with a residual, the norm of their sum, and the sum."""
        return rms_norm(x, self.weight, self.eps, residual)


@dataclass
class Rows:
    """What every layer needs to know of the rows it is given, and how they attend.

    kv_start, kv_end: int32 [T], intervals over the keys of the pack; plan: made of them, None for a decode step;
    cos, sin: [T, D/2].
    """

    kv_start: Tensor
    kv_end: Tensor
    plan: AttentionPlan | None
    cos: Tensor
    sin: Tensor

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Attention of these rows, [T, H, D]. On a mesh the keys of other ranks take part."""
        return attention(q_THD, k_TKD, v_TKD, self.kv_start, self.kv_end, plan=self.plan)


class LayerCache:
    """Keys and values of one layer, [B, L, K, D]."""

    def __init__(self, batch: int, length: int, config: LanguageConfig, like: Tensor):
        shape = (batch, length, config.num_kv_heads, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)

    def store(self, k: Tensor, v: Tensor, sequence: Tensor, position: Tensor) -> None:
        """Write rows k, v [T, K, D] at (sequence[t], position[t])."""
        self.k[sequence, position], self.v[sequence, position] = k, v

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences, in this order."""
        self.k, self.v = self.k[sequences], self.v[sequences]


@dataclass
class CacheStep:
    """One call with a cache: where its rows go, and, when it is a decode step, how many keys each sequence then has."""

    layers: list[LayerCache]
    sequence: Tensor  # int64 [T]
    position: Tensor  # int64 [T]
    decode: bool  # one row a sequence, read from the cache; otherwise a prefill, read from the rows themselves


class Attention(nn.Module):
    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.width, config.num_heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_TC: Tensor, rows: Rows, cache: LayerCache | None, step: CacheStep | None) -> Tensor:
        q, k, v = (p(x_TC).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        q, k = _normalise_and_turn(q, self.q_norm, rows), _normalise_and_turn(k, self.k_norm, rows)
        if cache is not None and step is not None:
            cache.store(k, v, step.sequence, step.position)
            if step.decode:
                filled = int(step.position.max()) + 1
                return self.out(decode_attention(q, cache.k[:, :filled], cache.v[:, :filled], step.position + 1).flatten(1))
        return self.out(rows.attend(q, k, v).flatten(1))


def _normalise_and_turn(x_THD: Tensor, norm: RMSNorm | None, rows: Rows) -> Tensor:
    """QK-norm, where there is one, and rotary embedding in one pass."""
    return rotary(x_THD, rows.cos, rows.sin) if norm is None else rotary(x_THD, rows.cos, rows.sin, norm.weight, norm.eps)


class DecoderBlock(nn.Module):
    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x_TC: Tensor, rows: Rows, cache: LayerCache | None = None, step: CacheStep | None = None) -> Tensor:
        h, x_TC = self.norm2(self.attention(self.norm1(x_TC), rows, cache, step), x_TC)
        return x_TC + self.down(swiglu(self.gate(h), self.up(h)))


class LanguageModel(nn.Module):
    """Embeddings [T, C] to final hidden states [T, C]; ``head_weight`` is what the hidden states are projected with.

    Blocks are kept by number, so that a part of the model, which holds some of them, calls its parameters by the same names.
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleDict({str(i): DecoderBlock(config) for i in range(config.num_layers)})
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def rows(self, positions: Tensor, kv_start: Tensor, kv_end: Tensor, dtype: torch.dtype, decode: bool = False) -> Rows:
        """The rows of a pack, each with its position in its document; ``dtype``: of the hidden states."""
        plan = None if decode else attention_plan(kv_start, kv_end)
        return Rows(kv_start, kv_end, plan, *self.rotary(positions, dtype))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, D/2] in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        scaling = self.config.yarn.scaling if self.config.yarn else None
        return rotary_table(positions, self.config.head_dim, self.config.rope_theta, wide, scaling)

    def forward(self, x_TC: Tensor, rows: Rows, step: CacheStep | None = None) -> Tensor:
        for i, block in enumerate(self.blocks.values()):
            x_TC = block(x_TC, rows, step.layers[i] if step else None, step)
        return self.norm(x_TC)
