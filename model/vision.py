"""SigLIP2-style vision tower (Tschannen et al. 2025, arXiv 2502.14786) over the tiles of a pack, and the projector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalt.kernels import AttentionPlan, attention, attention_plan, gelu, layer_norm

from .config import ModelConfig, VisionConfig


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class VisionBlock(nn.Module):
    """Pre-norm block: attention inside each tile, then an MLP; both with biases."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, config.width)
        self.v = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.up = nn.Linear(config.width, config.ffn)
        self.down = nn.Linear(config.ffn, config.width)

    def forward(self, x_TC: Tensor, kv_start: Tensor, kv_end: Tensor, plan: AttentionPlan) -> Tensor:
        h = self.norm1(x_TC)
        q, k, v = (p(h).unflatten(-1, (self.num_heads, -1)) for p in (self.q, self.k, self.v))
        x_TC = x_TC + self.out(attention(q, k, v, kv_start, kv_end, plan=plan).flatten(1))
        return x_TC + self.down(gelu(self.up(self.norm2(x_TC))))


class VisionTower(nn.Module):
    """Tiles [N, 3, S, S] to patch features [N, grid, grid, C]. All tiles go through in one call, as rows of one pack."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(3 * config.patch**2, config.width)
        self.position = nn.Parameter(torch.zeros(config.grid**2, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.width, config.norm_eps)

    def forward(self, tiles_N3SS: Tensor) -> Tensor:
        n, grid, patch = tiles_N3SS.shape[0], self.config.grid, self.config.patch
        patches = tiles_N3SS.view(n, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, -1)
        x = (self.patch_embed(patches) + self.position).flatten(0, 1)
        kv_start = torch.arange(n, dtype=torch.int32, device=x.device).repeat_interleave(grid * grid) * (grid * grid)
        kv_end = kv_start + grid * grid
        plan = attention_plan(kv_start, kv_end)
        for block in self.blocks:
            x = block(x, kv_start, kv_end, plan)
        return self.norm(x).view(n, grid, grid, -1)


class Projector(nn.Module):
    """Merges merge x merge neighbouring patches and maps them into the language model's width by a two-layer MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.merge = config.vision.merge
        hidden = config.projector_width or config.language.width
        self.up = nn.Linear(config.vision.width * self.merge**2, hidden)
        self.down = nn.Linear(hidden, config.language.width)

    def forward(self, x_NGGC: Tensor) -> Tensor:
        """[N, grid, grid, C] to [N * tokens_per_tile, D], tiles in order, rows of a tile in reading order."""
        m = self.merge
        pad = -x_NGGC.shape[1] % m
        if pad:
            x_NGGC = F.pad(x_NGGC, (0, 0, 0, pad, 0, pad))
        n, g, _, c = x_NGGC.shape
        x = x_NGGC.view(n, g // m, m, g // m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, m * m * c)
        return self.down(gelu(self.up(x)))
