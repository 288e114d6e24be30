"""The two activations of the model.

swiglu(gate, up) = silu(gate) * up                                      Shazeer 2020 (arXiv 2002.05202), eq. 6
gelu(x)          = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))        Hendrycks & Gimpel 2016 (arXiv 1606.08415)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: the same shape and dtype; returns that shape and dtype."""
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation, as SigLIP uses it."""
    return F.gelu(x, approximate="tanh")
