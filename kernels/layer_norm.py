"""LayerNorm over the last dim (Ba et al. 2016, arXiv 1607.06450, eq. 4); computed in at least fp32, returned in x's dtype.

y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [..., D]; weight, bias: [D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)
