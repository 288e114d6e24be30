"""LayerNorm over the last dim, with weight and bias (Ba et al. 2016, arXiv 1607.06450, eq. 4).

    n = (x - mean(x)) / sqrt(var(x) + eps),   y = n * weight + bias

in fp32, rounded once to x's dtype; var divides by D. The gradients:
dw[d] = sum_t dy[t, d] n[t, d],   db[d] = sum_t dy[t, d],
dx = (dn - mean(dn) - n mean(dn n)) / sqrt(var(x) + eps)   with   dn = dy weight.

Bytes: x once in and y once out (backward: x and dy in, dx out), two fp32 statistics a row, and for every ROWS rows once weight and
bias (backward: weight, and dw and db of these rows in fp32). ROWS is therefore far more than the rows that fit in registers.
The sum over rows is a fixed tree: each program sums its rows into one row of a matrix, whose columns are then summed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .column_sum import column_sum
from .dispatch import current_backend, differentiable, runs_definition, runs_kernel, without_dispatcher
from .launch import as_rows, cdiv, configuration, convert, jit, launch, next_power_of_two, tl

MAX_WIDTH = 8192  # a program holds whole rows in registers


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise x; differentiable in x, weight and bias.

    x: [..., D] of any strides; weight, bias: [D] of any float dtype. Returns [..., D] in x's dtype. Raises ValueError when the
    shapes do not fit.
    """
    if weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        raise ValueError(
            f"layer_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; expected [..., D], [D] and [D]"
        )
    implementation = current_backend(x)
    if runs_definition(implementation, x):
        return layer_norm_reference(x, weight, bias, eps)
    if implementation == "liger":
        return _liger(x, weight, bias, eps)
    return _call(x, weight, bias, eps, implementation)[0]


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


# A program takes ROWS rows, so that weight and bias are read once for them.
@jit(varying=("num_rows",))
def _forward_kernel(
    x, weight, bias, y, mean, inverse, num_rows, num_columns, x_stride, eps,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    column = (d < num_columns)[None, :]
    w = tl.load(weight + d, mask=d < num_columns, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=d < num_columns, other=0.0).to(tl.float32)
    for first in range(0, ROWS, BLOCK_T):
        t = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, BLOCK_T)
        inside = (t < num_rows)[:, None] & column
        s = tl.load(x + t[:, None] * x_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        average = tl.sum(s, axis=1) / num_columns
        # Two passes over registers: the mean of squares less the squared mean would cancel. Columns that only pad count as zero.
        s = tl.where(column, s - average[:, None], 0.0)
        rsqrt = 1.0 / tl.sqrt(tl.sum(s * s, axis=1) / num_columns + eps)
        n = s * rsqrt[:, None]
        tl.store(y + t[:, None] * num_columns + d[None, :], convert(n * w[None, :] + b[None, :], y.dtype.element_ty), mask=inside)
        tl.store(mean + t, average, mask=t < num_rows)
        tl.store(inverse + t, rsqrt, mask=t < num_rows)


# As forward; a program also adds up dw and db of its ROWS rows, so that there are few partial sums.
@jit(varying=("num_rows",))
def _backward_kernel(
    dy, x, weight, mean, inverse, dx, partial, num_rows, num_columns, dy_stride, x_stride,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    column = (d < num_columns)[None, :]
    w = tl.load(weight + d, mask=d < num_columns, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, ROWS, BLOCK_T):
        t = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, BLOCK_T)
        inside = (t < num_rows)[:, None] & column
        average = tl.load(mean + t, mask=t < num_rows, other=0.0)[:, None]
        rsqrt = tl.load(inverse + t, mask=t < num_rows, other=0.0)[:, None]
        # In columns that only pad, n is not zero, but dy and weight are, and with them all that n meets.
        n = (tl.load(x + t[:, None] * x_stride + d[None, :], mask=inside, other=0.0).to(tl.float32) - average) * rsqrt
        g = tl.load(dy + t[:, None] * dy_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        dn = g * w[None, :]
        ds = (dn - (tl.sum(dn, axis=1) / num_columns)[:, None] - n * (tl.sum(dn * n, axis=1) / num_columns)[:, None]) * rsqrt
        tl.store(dx + t[:, None] * num_columns + d[None, :], convert(ds, dx.dtype.element_ty), mask=inside)
        dw += tl.sum(g * n, axis=0)
        db += tl.sum(g, axis=0)
    out = partial + tl.program_id(0).to(tl.int64) * num_columns * 2 + d
    tl.store(out, dw, mask=d < num_columns)
    tl.store(out + num_columns, db, mask=d < num_columns)


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and 1 / standard deviation of x [T, D]."""
    T, D = x.shape
    y, mean, inverse = x.new_empty(T, D), x.new_empty(T, dtype=torch.float32), x.new_empty(T, dtype=torch.float32)
    config = configuration("layer_norm_forward", D, x)
    launch(
        "layer_norm_forward", _forward_kernel, (cdiv(T, config.tiles["ROWS"]),),
        x, weight, bias, y, mean, inverse, T, D, x.stride(0), eps, config=config, BLOCK_D=next_power_of_two(D),
    )  # fmt: skip
    return y, mean, inverse


def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx [T, D] in x's dtype, and dw and db as the rows of a matrix in ``sum_dtype``."""
    T, D = x.shape
    config = configuration("layer_norm_backward", D, x)
    programs = cdiv(T, config.tiles["ROWS"])
    dx, partial = x.new_empty(T, D), x.new_empty(programs, 2 * D, dtype=torch.float32)
    launch(
        "layer_norm_backward", _backward_kernel, (programs,),
        dy, x, weight, mean, inverse, dx, partial, T, D, dy.stride(0), x.stride(0), config=config, BLOCK_D=next_power_of_two(D),
    )  # fmt: skip
    return dx, column_sum(partial, sum_dtype).view(2, D)


def torch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`launch_forward` returns, in plain torch and any float dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y, mean, inverse = torch.native_layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype), mean.view(-1), inverse.view(-1)


def torch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What :func:`launch_backward` returns, in plain torch and any float dtype."""
    wide = mean.dtype
    g, w = dy.to(wide), weight.to(wide)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        g, x.to(wide), weight.shape, mean[:, None], inverse[:, None], w, torch.zeros_like(w), [True, True, True]
    )
    return dx.to(x.dtype), torch.stack([dw, db]).to(sum_dtype)


def _compute(x: Tensor, weight: Tensor, bias: Tensor, eps: float, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    forward = launch_forward if runs_kernel(implementation, x, MAX_WIDTH) else torch_forward
    y, mean, inverse = forward(as_rows(x), weight, bias, eps)
    return y.view(x.shape), mean, inverse


_layer_norm = torch.library.custom_op("smalt::layer_norm", mutates_args=())(_compute)


@_layer_norm.register_fake
def _(x, weight, bias, eps, implementation):
    rows, wide = x.numel() // x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _gradient(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, sum_dtype: torch.dtype, implementation: str
) -> tuple[Tensor, Tensor]:
    backward = launch_backward if runs_kernel(implementation, x, MAX_WIDTH) else torch_backward
    dx, sums = backward(as_rows(dy), as_rows(x), weight, mean, inverse, sum_dtype)
    return dx.view(x.shape), sums


_layer_norm_backward = torch.library.custom_op("smalt::layer_norm_backward", mutates_args=())(_gradient)


@_layer_norm_backward.register_fake
def _(dy, x, weight, mean, inverse, sum_dtype, implementation):
    return x.new_empty(x.shape), weight.new_empty(2, x.shape[-1], dtype=sum_dtype)


_differentiate = without_dispatcher(_layer_norm_backward, _gradient)


def _setup(ctx, inputs, output):
    x, weight, bias, _, ctx.implementation = inputs
    _, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, mean, inverse)


def _backward(ctx, dy, _, __):
    x, weight, mean, inverse = ctx.saved_tensors
    # One dtype for the sums: that of both parameters, as a rule; else the wider, so that neither is rounded twice.
    sum_dtype = torch.promote_types(weight.dtype, ctx.bias_dtype)
    dx, sums = _differentiate(dy, x, weight, mean, inverse, sum_dtype, ctx.implementation)
    return dx, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None


_layer_norm.register_autograd(_backward, setup_context=_setup)
_call = differentiable(_layer_norm, _compute, _setup, _backward)


def _liger(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, eps)
