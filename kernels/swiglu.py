"""SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6): swiglu(gate, up) = silu(gate) up,   silu(x) = x / (1 + exp(-x)).

Formed in fp32 and rounded once. Kernel, gradient and bytes moved: gated.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import current_backend, runs_definition
from .gated import activation_unit, check_packed, check_unit


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: [..., F], of any strides, of one dtype; returns that shape and dtype. Differentiable in both.

    Raises ValueError when shapes or dtypes differ. Under ``liger`` the backward pass writes the gradients over gate and up.
    """
    check_unit("swiglu", gate, up)
    implementation = current_backend(gate)
    if runs_definition(implementation, gate):
        return swiglu_reference(gate, up)
    if implementation == "liger":
        from liger_kernel.ops import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)
    return activation_unit(gate, up, "silu", False, implementation)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """swiglu of gate_up [..., 2 F], gate before up, as one projection gives them; returns [..., F]. The gradient is one tensor.

    Raises ValueError when the last dim is odd.
    """
    check_packed("swiglu_packed", gate_up)
    implementation = current_backend(gate_up)
    if runs_definition(implementation, gate_up):
        return swiglu_reference(*gate_up.chunk(2, -1))
    if implementation == "liger":
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

        return LigerFusedGateUpSiLUMulFunction.apply(gate_up)
    return activation_unit(gate_up, None, "silu", True, implementation)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
