"""GELU in its tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415), alone and as the gate of GeGLU (Shazeer 2020, arXiv 2002.05202).

    gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))),   geglu(gate, up) = gelu(gate) up

Formed in fp32 and rounded once. Kernel, gradient and bytes moved: gated.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import current_backend, runs_definition
from .gated import activation_unit, check_packed, check_unit


def gelu(x: Tensor) -> Tensor:
    """x: [..., F], of any strides; returns that shape and dtype. Differentiable. Liger has no such kernel."""
    implementation = current_backend(x)
    if runs_definition(implementation, x):
        return gelu_reference(x)
    return activation_unit(x, None, "gelu", False, implementation)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: [..., F], of any strides, of one dtype; returns that shape and dtype. Differentiable in both.

    Raises ValueError when shapes or dtypes differ. Under ``liger`` the backward pass writes the gradients over gate and up.
    """
    check_unit("geglu", gate, up)
    implementation = current_backend(gate)
    if runs_definition(implementation, gate):
        return geglu_reference(gate, up)
    if implementation == "liger":
        from liger_kernel.ops import LigerGELUMulFunction

        return LigerGELUMulFunction.apply(gate, up)
    return activation_unit(gate, up, "gelu", False, implementation)


def geglu_packed(gate_up: Tensor) -> Tensor:
    """geglu of gate_up [..., 2 F], gate before up, as one projection gives them; returns [..., F]. The gradient is one tensor.

    Raises ValueError when the last dim is odd. Liger has no such kernel.
    """
    check_packed("geglu_packed", gate_up)
    implementation = current_backend(gate_up)
    if runs_definition(implementation, gate_up):
        return geglu_reference(*gate_up.chunk(2, -1))
    return activation_unit(gate_up, None, "gelu", True, implementation)


def gelu_reference(x: Tensor) -> Tensor:
    """The definition."""
    return F.gelu(x.to(torch.promote_types(x.dtype, torch.float32)), approximate="tanh").to(x.dtype)


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.gelu(gate.to(wide), approximate="tanh") * up.to(wide)).to(gate.dtype)
