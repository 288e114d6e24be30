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
    rotate = rotary_reference if current_backend() == "reference" else _Rotary.apply
    return rotate(x_THD.to(cos.dtype), cos, sin).to(x_THD.dtype)


def rotary_reference(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition. Shapes as in :func:`rotary`, one dtype."""
    first, second = x_THD.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _Rotary(torch.autograd.Function):
    """Three passes over the tensor. The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x_THD.chunk(2, -1)
    y = (x_THD.unflatten(-1, (2, -1)) * cos[:, None, None]).flatten(-2)
    y_first, y_second = y.chunk(2, -1)
    y_first.addcmul_(second, sin[:, None], value=-direction)
    y_second.addcmul_(first, sin[:, None], value=direction)
    return y
