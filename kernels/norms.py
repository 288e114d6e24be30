"""Normalisation over the last dim, computed in at least fp32 and returned in the input's dtype.

rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight                      Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4
layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias      Ba et al. 2016 (arXiv 1607.06450), eq. 4
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import current_backend


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., D]; weight: [D]. The weight is applied before the cast back to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if current_backend() == "reference":
        return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)
    return _RMSNorm.apply(x.to(wide), weight.to(wide), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row; torch makes its rms_norm of small operations on a CPU, and keeps what they make."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        # y = n w with n = x / rms, so with dn = dy w: dx = (dn - n mean(dn n)) / rms, and dw = sum over rows of dy n.
        x, weight, inverse = ctx.saved_tensors
        n, dn = x * inverse, grad * weight
        dx = dn.addcmul(n, (dn * n).mean(-1, keepdim=True), value=-1).mul_(inverse)
        return dx, (grad * n).flatten(0, -2).sum(0), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [..., D]; weight, bias: [D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)
