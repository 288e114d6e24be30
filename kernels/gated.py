"""Activation units: the machinery under ``swiglu``, ``geglu`` and ``gelu``.

    y = f(gate) up   or   y = f(gate);    dgate = dy up f'(gate),   dup = dy f(gate)

    silu:  f(x) = x s(x),       f'(x) = s(x) (1 + x (1 - s(x)))                     s the logistic function
    gelu:  f(x) = x s(v(x)),    f'(x) = s(v) (1 + x (1 - s(v)) v'(x))              v(x) = sqrt(8 / pi) (x + 0.044715 x^3)

The second is the tanh form of GELU: (1 + tanh(z)) / 2 = s(2 z). Left of zero s has no cancellation where 1 + tanh(z) has, and it takes
one exponential. All is formed in fp32 and rounded once; the backward pass computes f again instead of keeping it.

Bytes: each input once in, each output once out, in both passes; no others.
Packed gate and up are two matrices with the row stride of one, in memory one after the other; so are their gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import differentiable, runs_kernel, without_dispatcher
from .launch import as_rows, cdiv, configuration, constexpr, convert, jit, launch, tl

_CUBIC = constexpr(0.044715)
_SCALE = constexpr(1.5957691216057308)  # sqrt(8 / pi)


@jit
def _activate(x, GELU: tl.constexpr):
    """f(x) and f'(x)."""
    if GELU:
        square = x * x * _CUBIC
        s = 1.0 / (1.0 + tl.exp(-x * (square + 1.0) * _SCALE))
        return x * s, s * (1.0 + x * (1.0 - s) * (square * 3.0 + 1.0) * _SCALE)
    s = 1.0 / (1.0 + tl.exp(-x))
    return x * s, s * (1.0 + x * (1.0 - s))


@jit(varying=("num_rows",))
def _forward_kernel(
    gate, up, y, num_rows, num_columns, gate_stride, up_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (t < num_rows)[:, None] & (f < num_columns)[None, :]
    value, _ = _activate(tl.load(gate + t[:, None] * gate_stride + f[None, :], mask=inside, other=0.0).to(tl.float32), GELU)
    if GATED:
        value *= tl.load(up + t[:, None] * up_stride + f[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t[:, None] * num_columns + f[None, :], convert(value, y.dtype.element_ty), mask=inside)


@jit(varying=("num_rows",))
def _backward_kernel(
    dy, gate, up, dgate, dup, num_rows, num_columns, dy_stride, gate_stride, up_stride, d_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, GELU: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (t < num_rows)[:, None] & (f < num_columns)[None, :]
    g = tl.load(dy + t[:, None] * dy_stride + f[None, :], mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(tl.load(gate + t[:, None] * gate_stride + f[None, :], mask=inside, other=0.0).to(tl.float32), GELU)
    if GATED:
        tl.store(dup + t[:, None] * d_stride + f[None, :], convert(g * value, dup.dtype.element_ty), mask=inside)
        g *= tl.load(up + t[:, None] * up_stride + f[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(dgate + t[:, None] * d_stride + f[None, :], convert(g * slope, dgate.dtype.element_ty), mask=inside)


def launch_forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """y [T, F] of gate and up [T, F]."""
    T, columns = gate.shape
    y = gate.new_empty(T, columns)
    second = gate if up is None else up
    config = configuration("gated_forward", columns, gate)
    launch(
        "gated_forward", _forward_kernel, (cdiv(T, config.tiles["BLOCK_T"]), cdiv(columns, config.tiles["BLOCK_F"])),
        gate, second, y, T, columns, gate.stride(0), second.stride(0),
        config=config, GELU=activation == "gelu", GATED=up is not None,
    )  # fmt: skip
    return y


def launch_backward(dy: Tensor, gate: Tensor, up: Tensor | None, activation: str, dgate: Tensor, dup: Tensor | None) -> None:
    """Writes dgate and dup [T, F], which share one row stride."""
    T, columns = gate.shape
    second, dsecond = (gate, dgate) if up is None else (up, dup)
    config = configuration("gated_backward", columns, gate)
    launch(
        "gated_backward", _backward_kernel, (cdiv(T, config.tiles["BLOCK_T"]), cdiv(columns, config.tiles["BLOCK_F"])),
        dy, gate, second, dgate, dsecond, T, columns, dy.stride(0), gate.stride(0), second.stride(0), dgate.stride(0),
        config=config, GELU=activation == "gelu", GATED=up is not None,
    )  # fmt: skip


def _value(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def torch_forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """What :func:`launch_forward` returns, in plain torch and any float dtype."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    value = _value(gate.to(wide), activation)
    return (value if up is None else value.mul_(up)).to(gate.dtype)


def torch_backward(dy: Tensor, gate: Tensor, up: Tensor | None, activation: str, dgate: Tensor, dup: Tensor | None) -> None:
    """What :func:`launch_backward` does, in plain torch and any float dtype."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, g = gate.to(wide), dy.to(wide)
    if up is not None and dup is not None:
        torch.mul(_value(x, activation), g, out=dup)
        g = g * up
    if activation == "silu":
        torch.ops.aten.silu_backward(g, x, grad_input=dgate)
    else:
        torch.ops.aten.gelu_backward(g, x, approximate="tanh", grad_input=dgate)


def activation_unit(gate: Tensor, up: Tensor | None, activation: str, packed: bool, implementation: str) -> Tensor:
    """f(gate) up, f(gate) without ``up``, or for a packed gate [..., 2 F] what f(gate[..., :F]) gate[..., F:] gives.

    activation: "silu" or "gelu"; implementation: "triton" or "torch". Differentiable in gate and up.
    """
    return _call(gate, up, activation, packed, implementation)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1] // 2
    return x[:, :width], x[:, width:]


def _split(gate: Tensor, up: Tensor | None, packed: bool) -> tuple[Tensor, Tensor | None]:
    gate = as_rows(gate)
    return _halves(gate) if packed else (gate, None if up is None else as_rows(up))


def _compute(gate: Tensor, up: Tensor | None, activation: str, packed: bool, implementation: str) -> Tensor:
    forward = launch_forward if runs_kernel(implementation, gate) else torch_forward
    y = forward(*_split(gate, up, packed), activation)
    return y.view(*gate.shape[:-1], y.shape[-1])


_unit = torch.library.custom_op("smalt::activation_unit", mutates_args=())(_compute)


@_unit.register_fake
def _(gate, up, activation, packed, implementation):
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // 2 if packed else gate.shape[-1])


def _gradient(
    dy: Tensor, gate: Tensor, up: Tensor | None, activation: str, packed: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, the second without elements where there is no up."""
    backward = launch_backward if runs_kernel(implementation, gate) else torch_backward
    rows = as_rows(gate)
    d, dup = gate.new_empty(rows.shape), gate.new_empty(rows.shape if up is not None else 0)
    halves = _halves(d) if packed else (d, dup if up is not None else None)
    backward(as_rows(dy), *_split(gate, up, packed), activation, *halves)
    return d.view(gate.shape), dup.view(gate.shape) if up is not None else dup


_unit_backward = torch.library.custom_op("smalt::activation_unit_backward", mutates_args=())(_gradient)


@_unit_backward.register_fake
def _(dy, gate, up, activation, packed, implementation):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)


_differentiate = without_dispatcher(_unit_backward, _gradient)


def _setup(ctx, inputs, output):
    gate, up, ctx.activation, ctx.packed, ctx.implementation = inputs
    ctx.separate = up is not None
    ctx.save_for_backward(gate, up)


def _backward(ctx, dy):
    gate, up = ctx.saved_tensors
    dgate, dup = _differentiate(dy, gate, up, ctx.activation, ctx.packed, ctx.implementation)
    return dgate, dup if ctx.separate else None, None, None, None


_unit.register_autograd(_backward, setup_context=_setup)
_call = differentiable(_unit, _compute, _setup, _backward)


def check_unit(name: str, gate: Tensor, up: Tensor) -> None:
    """Raises ValueError unless gate and up have one shape and one dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{name}: gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}; expected one shape and one dtype"
        )


def check_packed(name: str, gate_up: Tensor) -> None:
    """Raises ValueError unless the last dim can be halved."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{name}: gate_up {tuple(gate_up.shape)}; expected [..., 2 F], gate before up")
