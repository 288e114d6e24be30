"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), in the half-split layout of Llama.

y[:D/2] = x[:D/2] cos - x[D/2:] sin,   y[D/2:] = x[D/2:] cos + x[:D/2] sin,   angle = position * theta^(-2 i / D)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import current_backend


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, D/2], of integer positions [T]. Angles are computed in float64: fp32 loses position 100,000."""
    index = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions.to(torch.float64)[:, None] * theta ** (-index / head_dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by the table of :func:`rotary_table`; out of place, in the table's dtype, returned in x's.

    Differentiable in x.
    """
    x = x_THD.to(cos.dtype)
    return (_rotate(x, cos, sin) if current_backend() == "reference" else _Rotary.apply(x, cos, sin)).to(x_THD.dtype)


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]
    return torch.addcmul(x_THD * cos, x_THD.roll(x_THD.shape[-1] // 2, -1), sin)


class _Rotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: one pass, where autograd would make one of each product."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None
