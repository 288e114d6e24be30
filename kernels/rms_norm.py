"""RMSNorm over the last dim, with an optional residual that is added first (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    s = x + residual,   n = s / sqrt(mean(s^2) + eps),   y = n * weight

s and n are formed in fp32. Of the two conventions for the weight, ``cast="after"`` multiplies in fp32 and casts the product to
x's dtype, as torch does; ``cast="before"`` casts n to x's dtype and multiplies there, as transformers' Llama does. Both give
dw[d] = sum_t dy[t, d] n[t, d],   ds = (dn - n mean(dn n)) / sqrt(mean(s^2) + eps)   with   dn = dy weight.

The sum over rows is a fixed tree: each program sums ROWS rows into one row of a matrix, whose columns are then summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .column_sum import column_sum
from .dispatch import current_backend, differentiable, runs_kernel, without_dispatcher
from .launch import as_rows, cdiv, configuration, convert, jit, launch, next_power_of_two, tl

MAX_WIDTH = 8192  # a program holds whole rows in registers


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, cast: str = "after"
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise x, or x + residual; differentiable in x, residual and weight.

    x: [..., D] of any strides; weight: [D] of any float dtype; residual: of x's shape. Returns y [..., D] in x's dtype; with a
    residual (y, x + residual), both in the wider dtype of the two, of which the second is what the next residual is added to.
    Raises ValueError when the shapes do not fit or ``cast`` is neither "after" nor "before".
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        added = "" if residual is None else f", residual {tuple(residual.shape)}"
        raise ValueError(f"rms_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)}{added}; expected [..., D], [D], and x's shape")
    if cast not in ("after", "before"):
        raise ValueError(f'rms_norm: cast is {cast!r}; choose "after" or "before"')
    if residual is not None and residual.dtype != x.dtype:  # under autocast: a wider residual stays what it is
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    implementation = current_backend(x)
    if implementation == "reference":
        y, total = rms_norm_reference(x, weight, eps, residual, cast)
    elif implementation == "liger" and residual is None:
        return _liger(x, weight, eps, cast)
    else:
        y, total, _ = _call(x, residual, weight, eps, cast == "before", implementation)
    return y if residual is None else (y, total)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, cast: str) -> tuple[Tensor, Tensor]:
    """The definition: y, and x + residual."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x if residual is None else x + residual
    s = total.to(wide)
    n = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    y = n * weight.to(wide) if cast == "after" else (n.to(x.dtype) * weight.to(x.dtype))
    return y.to(x.dtype), total


# Tiles on sm_90, rows of 2560: ROWS = 32, BLOCK_T = 2, 8 warps. A program takes ROWS rows, so that the weight is read once for them.
@jit(varying=("num_rows",))
def _forward_kernel(
    x, residual, weight, y, total, inverse, num_rows, num_columns, x_stride, residual_stride, eps,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, CAST_BEFORE: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    column = (d < num_columns)[None, :]
    w = tl.load(weight + d, mask=d < num_columns, other=0.0).to(tl.float32)
    if CAST_BEFORE:
        w = convert(w, y.dtype.element_ty).to(tl.float32)
    for first in range(0, ROWS, BLOCK_T):
        t = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, BLOCK_T)
        inside = (t < num_rows)[:, None] & column
        s = tl.load(x + t[:, None] * x_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            # What is normalised is what is returned: the sum as x's dtype holds it.
            s += tl.load(residual + t[:, None] * residual_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
            s = convert(s, total.dtype.element_ty)
            tl.store(total + t[:, None] * num_columns + d[None, :], s, mask=inside)
            s = s.to(tl.float32)
        rsqrt = 1.0 / tl.sqrt(tl.sum(s * s, axis=1) / num_columns + eps)
        n = s * rsqrt[:, None]
        if CAST_BEFORE:
            n = convert(n, y.dtype.element_ty).to(tl.float32)
        tl.store(y + t[:, None] * num_columns + d[None, :], convert(n * w[None, :], y.dtype.element_ty), mask=inside)
        tl.store(inverse + t, rsqrt, mask=t < num_rows)


@jit(varying=("num_rows",))
def _backward_kernel(
    dy, dtotal, s, weight, inverse, dx, partial, num_rows, num_columns, dy_stride, dtotal_stride, s_stride,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, CAST_BEFORE: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    column = (d < num_columns)[None, :]
    w = tl.load(weight + d, mask=d < num_columns, other=0.0).to(tl.float32)
    if CAST_BEFORE:
        w = convert(w, dx.dtype.element_ty).to(tl.float32)
    dw = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, ROWS, BLOCK_T):
        t = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, BLOCK_T)
        inside = (t < num_rows)[:, None] & column
        rsqrt = tl.load(inverse + t, mask=t < num_rows, other=0.0)[:, None]
        n = tl.load(s + t[:, None] * s_stride + d[None, :], mask=inside, other=0.0).to(tl.float32) * rsqrt
        g = tl.load(dy + t[:, None] * dy_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        dn = g * w[None, :]
        ds = (dn - n * (tl.sum(dn * n, axis=1) / num_columns)[:, None]) * rsqrt
        if RESIDUAL:
            ds += tl.load(dtotal + t[:, None] * dtotal_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + t[:, None] * num_columns + d[None, :], convert(ds, dx.dtype.element_ty), mask=inside)
        if CAST_BEFORE:
            n = convert(n, dx.dtype.element_ty).to(tl.float32)
        dw += tl.sum(g * n, axis=0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * num_columns + d, dw, mask=d < num_columns)


def launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cast_before: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (of no rows without one) and 1 / rms of x [T, D]."""
    T, D = x.shape
    y, inverse = x.new_empty(T, D), x.new_empty(T, dtype=torch.float32)
    total = x.new_empty(T if residual is not None else 0, D)
    added = x if residual is None else residual
    config = configuration("rms_norm_forward", D, x)
    launch(
        "rms_norm_forward", _forward_kernel, (cdiv(T, config.tiles["ROWS"]),),
        x, added, weight, y, total, inverse, T, D, x.stride(0), added.stride(0), eps,
        config=config, BLOCK_D=next_power_of_two(D), RESIDUAL=residual is not None, CAST_BEFORE=cast_before,
    )  # fmt: skip
    return y, total, inverse


def launch_backward(
    dy: Tensor, dtotal: Tensor | None, s: Tensor, weight: Tensor, inverse: Tensor, cast_before: bool
) -> tuple[Tensor, Tensor]:
    """dx [T, D] in s's dtype and dw [D] in weight's."""
    T, D = s.shape
    config = configuration("rms_norm_backward", D, s)
    programs = cdiv(T, config.tiles["ROWS"])
    dx, partial = s.new_empty(T, D), s.new_empty(programs, D, dtype=torch.float32)
    added = dy if dtotal is None else dtotal
    launch(
        "rms_norm_backward", _backward_kernel, (programs,),
        dy, added, s, weight, inverse, dx, partial, T, D, dy.stride(0), added.stride(0), s.stride(0),
        config=config, BLOCK_D=next_power_of_two(D), RESIDUAL=dtotal is not None, CAST_BEFORE=cast_before,
    )  # fmt: skip
    return dx, column_sum(partial, weight.dtype)


def torch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cast_before: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`launch_forward` returns, in plain torch and any float dtype."""
    total = x.new_empty(0, x.shape[1]) if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    s = (x if residual is None else total).to(wide)
    inverse = torch.linalg.vector_norm(s, dim=-1).square_().div_(s.shape[-1]).add_(eps).rsqrt_()
    n = s * inverse[:, None]
    y = n.to(x.dtype) * weight.to(x.dtype) if cast_before else n.mul_(weight.to(wide)).to(x.dtype)
    return y, total, inverse


def torch_backward(
    dy: Tensor, dtotal: Tensor | None, s: Tensor, weight: Tensor, inverse: Tensor, cast_before: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`launch_backward` returns, in plain torch and any float dtype."""
    wide, rsqrt = inverse.dtype, inverse[:, None]
    w = (weight.to(s.dtype) if cast_before else weight).to(wide)
    n, g = s.to(wide) * rsqrt, dy.to(wide)
    gn = g * n
    ds = (g * w).addcmul_(n, torch.mv(gn, w).div_(-s.shape[-1])[:, None]).mul_(rsqrt)
    if dtotal is not None:
        ds += dtotal
    return ds.to(s.dtype), ((g * n.to(s.dtype)) if cast_before else gn).sum(0).to(weight.dtype)


def _compute(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cast_before: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    forward = launch_forward if runs_kernel(implementation, x, MAX_WIDTH) else torch_forward
    y, total, inverse = forward(as_rows(x), None if residual is None else as_rows(residual), weight, eps, cast_before)
    return y.view(x.shape), total if residual is None else total.view(x.shape), inverse


_rms_norm = torch.library.custom_op("smalt::rms_norm", mutates_args=())(_compute)


@_rms_norm.register_fake
def _(x, residual, weight, eps, cast_before, implementation):
    total = x.new_empty(0, x.shape[-1]) if residual is None else x.new_empty(x.shape)
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), total, x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))


def _gradient(
    dy: Tensor, dtotal: Tensor | None, s: Tensor, weight: Tensor, inverse: Tensor, cast_before: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    backward = launch_backward if runs_kernel(implementation, s, MAX_WIDTH) else torch_backward
    dx, dw = backward(as_rows(dy), None if dtotal is None else as_rows(dtotal), as_rows(s), weight, inverse, cast_before)
    return dx.view(s.shape), dw


_rms_norm_backward = torch.library.custom_op("smalt::rms_norm_backward", mutates_args=())(_gradient)


@_rms_norm_backward.register_fake
def _(dy, dtotal, s, weight, inverse, cast_before, implementation):
    return s.new_empty(s.shape), weight.new_empty(weight.shape)


_differentiate = without_dispatcher(_rms_norm_backward, _gradient)


def _setup(ctx, inputs, output):
    x, residual, weight, _, ctx.cast_before, ctx.implementation = inputs
    _, total, inverse = output
    ctx.mark_non_differentiable(inverse)
    ctx.with_residual = residual is not None
    ctx.save_for_backward(total if ctx.with_residual else x, weight, inverse)


def _backward(ctx, dy, dtotal, _):
    s, weight, inverse = ctx.saved_tensors
    dtotal = dtotal if ctx.with_residual else None
    dx, dw = _differentiate(dy, dtotal, s, weight, inverse, ctx.cast_before, ctx.implementation)
    return dx, dx if ctx.with_residual else None, dw, None, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup)
_call = differentiable(_rms_norm, _compute, _setup, _backward)


def _liger(x: Tensor, weight: Tensor, eps: float, cast: str) -> Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    # Liger's "gemma" multiplies in fp32, its "llama" after the cast.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma" if cast == "after" else "llama", False)
