"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34) in the half-split layout of Llama, out of place.

    y[i] = n[i] cos[t, i] - n[i + R/2] sin[t, i],   y[i + R/2] = n[i + R/2] cos[t, i] + n[i] sin[t, i],   i < R/2
    y[i] = n[i],   i >= R

of each head x of token t, where n = x, or with a norm (QK-norm, the formula of rms_norm) n = x / sqrt(mean(x^2) + eps) * weight
over all D dims of the head. Everything is formed in fp32 and rounded once: n is not rounded to x's dtype on its way to the rotation.

The gradient of a rotation is the rotation back. Behind it, with g = dL/dn and u = n / weight,
dx = (dn - u mean(dn u)) / sqrt(mean(x^2) + eps)   with   dn = g weight,   dweight[i] = sum over tokens and heads of g[i] u[i];
the root is computed again. A program sums dweight over ROWS tokens; the sums of all are then added as a fixed tree (column_sum).

The tables come from rotary_tables.py; a kernel forms no angle, and knows of no scaling and no axes.
Bytes: x and the table once in, y once out. With a norm each program reads the weight too; backward, x, dy and the table once in, dx
once out, and each program reads the weight and writes its sum of dweight. In bf16 that adds under 5% where a program has at least
20 heads, BLOCK_T tokens together (backward: 40 heads, ROWS tokens together).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .column_sum import column_sum
from .dispatch import current_backend, differentiable, runs_kernel, without_dispatcher
from .launch import cdiv, configuration, convert, jit, launch, next_power_of_two, tl, unit_stride

MAX_HEAD_DIM = 512  # a program holds whole heads in registers


def rotary(x_THD: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Rotate the first R dims of every head of x, normalised before when ``norm_weight`` is given.

    x: [T, H, D] of any strides (a slice of a packed projection is not copied unless its last dim is strided); cos, sin:
    [T, R/2], 2 <= R <= D, of any float dtype, from :mod:`smalt.kernels.rotary_tables`; norm_weight: [D], eps: of the RMSNorm over D.
    Returns a contiguous [T, H, D] in x's dtype. Differentiable in x and norm_weight. Raises ValueError when the shapes do not fit.
    Liger rotates in place; under ``liger`` this is Smalt's kernel.
    """
    fits = x_THD.dim() == 3 and cos.dim() == 2 and cos.shape == sin.shape and len(cos) == len(x_THD)
    if not fits or not 2 <= 2 * cos.shape[1] <= x_THD.shape[2] or (norm_weight is not None and norm_weight.shape != x_THD.shape[2:]):
        added = "" if norm_weight is None else f", norm_weight {tuple(norm_weight.shape)}"
        raise ValueError(
            f"rotary: x {tuple(x_THD.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}{added}; "
            "expected [T, H, D], [T, R/2] twice with R <= D, and [D]"
        )
    implementation = current_backend(x_THD)
    if implementation == "reference":
        return rotary_reference(x_THD, cos, sin, norm_weight, eps)
    return _call(x_THD, cos, sin, norm_weight, eps, implementation)


def rotary_reference(x_THD: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The definition."""
    wide = _wide(x_THD, cos)
    n, half = x_THD.to(wide), cos.shape[1]
    if norm_weight is not None:
        n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    first, second, rest = n.split([half, half, n.shape[-1] - 2 * half], -1)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x_THD.dtype)


def _wide(x: Tensor, cos: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)


# Widths are constants, and strides come divided by ALIGN, so that the compiler knows what they are multiples of: it loads 16 bytes at
# once where the head dim is 64 or 80, and 8 where it is 72 and the second half of a head begins 72 bytes after the first.
# A program holds BLOCK_T tokens and goes through all their heads, BLOCK_H at a time, so that the table is read once a token.
@jit(varying=("num_tokens",))
def _rotate_kernel(
    x, cos, sin, weight, y, num_tokens, num_heads, token_stride, head_stride, eps, ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, BACK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.arange(0, BLOCK_HALF)
    token, pair = t < num_tokens, i < HALF
    c = tl.load(cos + t[:, None] * HALF + i[None, :], mask=token[:, None] & pair[None, :], other=0.0).to(tl.float32)[:, None, :]
    s = tl.load(sin + t[:, None] * HALF + i[None, :], mask=token[:, None] & pair[None, :], other=0.0).to(tl.float32)[:, None, :]
    if BACK:
        s = -s
    if NORM:
        w_first = tl.load(weight + i, mask=pair, other=0.0).to(tl.float32)[None, None, :]
        w_second = tl.load(weight + HALF + i, mask=pair, other=0.0).to(tl.float32)[None, None, :]
    for start in range(0, num_heads, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        head = token[:, None] & (h < num_heads)[None, :]
        inside = head[:, :, None] & pair[None, None, :]
        source = x + ((t[:, None] * token_stride + h.to(tl.int64)[None, :] * head_stride) * ALIGN)[:, :, None]
        target = y + (t[:, None] * num_heads + h[None, :])[:, :, None] * HEAD_DIM
        first = tl.load(source + i[None, None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + i[None, None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares = tl.sum(first * first, axis=2) + tl.sum(second * second, axis=2)
        if BLOCK_REST > 0:
            j = 2 * HALF + tl.arange(0, BLOCK_REST)
            beyond = head[:, :, None] & (j < HEAD_DIM)[None, None, :]
            rest = tl.load(source + j[None, None, :], mask=beyond, other=0.0).to(tl.float32)
            if NORM:
                squares += tl.sum(rest * rest, axis=2)
        if NORM:
            rsqrt = (1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, :, None]
            first, second = first * rsqrt * w_first, second * rsqrt * w_second
        tl.store(target + i[None, None, :], convert(first * c - second * s, y.dtype.element_ty), mask=inside)
        tl.store(target + HALF + i[None, None, :], convert(second * c + first * s, y.dtype.element_ty), mask=inside)
        if BLOCK_REST > 0:
            if NORM:
                rest *= rsqrt * tl.load(weight + j, mask=j < HEAD_DIM, other=0.0).to(tl.float32)[None, None, :]
            tl.store(target + j[None, None, :], convert(rest, y.dtype.element_ty), mask=beyond)


@jit(varying=("num_tokens",))
def _norm_backward_kernel(
    dy, x, cos, sin, weight, dx, partial, num_tokens, num_heads, dy_token_stride, dy_head_stride, token_stride, head_stride, eps,
    ALIGN: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK_HALF)
    pair = i < HALF
    w_first = tl.load(weight + i, mask=pair, other=0.0).to(tl.float32)[None, None, :]
    w_second = tl.load(weight + HALF + i, mask=pair, other=0.0).to(tl.float32)[None, None, :]
    dw_first = tl.zeros([BLOCK_HALF], tl.float32)
    dw_second = tl.zeros([BLOCK_HALF], tl.float32)
    if BLOCK_REST > 0:
        j = 2 * HALF + tl.arange(0, BLOCK_REST)
        w_rest = tl.load(weight + j, mask=j < HEAD_DIM, other=0.0).to(tl.float32)[None, None, :]
        dw_rest = tl.zeros([BLOCK_REST], tl.float32)
    for row in range(0, ROWS, BLOCK_T):
        t = tl.program_id(0).to(tl.int64) * ROWS + row + tl.arange(0, BLOCK_T)
        token = t < num_tokens
        c = tl.load(cos + t[:, None] * HALF + i[None, :], mask=token[:, None] & pair[None, :], other=0.0).to(tl.float32)[:, None, :]
        s = tl.load(sin + t[:, None] * HALF + i[None, :], mask=token[:, None] & pair[None, :], other=0.0).to(tl.float32)[:, None, :]
        for start in range(0, num_heads, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            head = token[:, None] & (h < num_heads)[None, :]
            inside = head[:, :, None] & pair[None, None, :]
            above = dy + ((t[:, None] * dy_token_stride + h.to(tl.int64)[None, :] * dy_head_stride) * ALIGN)[:, :, None]
            source = x + ((t[:, None] * token_stride + h.to(tl.int64)[None, :] * head_stride) * ALIGN)[:, :, None]
            target = dx + (t[:, None] * num_heads + h[None, :])[:, :, None] * HEAD_DIM
            first = tl.load(source + i[None, None, :], mask=inside, other=0.0).to(tl.float32)
            second = tl.load(source + HALF + i[None, None, :], mask=inside, other=0.0).to(tl.float32)
            dy_first = tl.load(above + i[None, None, :], mask=inside, other=0.0).to(tl.float32)
            dy_second = tl.load(above + HALF + i[None, None, :], mask=inside, other=0.0).to(tl.float32)
            g_first, g_second = dy_first * c + dy_second * s, dy_second * c - dy_first * s
            squares = tl.sum(first * first, axis=2) + tl.sum(second * second, axis=2)
            product = tl.sum(g_first * w_first * first, axis=2) + tl.sum(g_second * w_second * second, axis=2)
            if BLOCK_REST > 0:
                beyond = head[:, :, None] & (j < HEAD_DIM)[None, None, :]
                rest = tl.load(source + j[None, None, :], mask=beyond, other=0.0).to(tl.float32)
                g_rest = tl.load(above + j[None, None, :], mask=beyond, other=0.0).to(tl.float32)
                squares += tl.sum(rest * rest, axis=2)
                product += tl.sum(g_rest * w_rest * rest, axis=2)
            # Heads that only pad would divide by zero where eps is zero, and dweight would see it.
            rsqrt = tl.where(head, 1.0 / tl.sqrt(squares / HEAD_DIM + eps), 0.0)[:, :, None]
            first, second, mean = first * rsqrt, second * rsqrt, product[:, :, None] * rsqrt / HEAD_DIM
            dx_first, dx_second = (g_first * w_first - first * mean) * rsqrt, (g_second * w_second - second * mean) * rsqrt
            tl.store(target + i[None, None, :], convert(dx_first, dx.dtype.element_ty), mask=inside)
            tl.store(target + HALF + i[None, None, :], convert(dx_second, dx.dtype.element_ty), mask=inside)
            dw_first += tl.sum(tl.sum(g_first * first, axis=0), axis=0)
            dw_second += tl.sum(tl.sum(g_second * second, axis=0), axis=0)
            if BLOCK_REST > 0:
                rest *= rsqrt
                tl.store(target + j[None, None, :], convert((g_rest * w_rest - rest * mean) * rsqrt, dx.dtype.element_ty), mask=beyond)
                dw_rest += tl.sum(tl.sum(g_rest * rest, axis=0), axis=0)
    out = partial + tl.program_id(0).to(tl.int64) * HEAD_DIM
    tl.store(out + i, dw_first, mask=pair)
    tl.store(out + HALF + i, dw_second, mask=pair)
    if BLOCK_REST > 0:
        tl.store(out + j, dw_rest, mask=j < HEAD_DIM)


def _constants(D: int, half: int, H: int, most_heads: int, strides: tuple[int, ...]) -> dict[str, int]:
    rest = D - 2 * half
    return {
        "ALIGN": math.gcd(8, *strides),
        "HEAD_DIM": D,
        "HALF": half,
        "BLOCK_H": min(most_heads, next_power_of_two(H)),
        "BLOCK_HALF": next_power_of_two(half),
        "BLOCK_REST": next_power_of_two(rest) if rest else 0,
    }


def launch_rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, back: bool) -> Tensor:
    """x [T, H, D], normalised with a weight, and turned, or turned back."""
    (T, H, D), half = x.shape, cos.shape[1]
    y = x.new_empty(T, H, D)
    config = configuration("rotary", H * D, x)
    constants = _constants(D, half, H, config.tiles["BLOCK_H"], x.stride()[:2])
    launch(
        "rotary", _rotate_kernel, (cdiv(T, config.tiles["BLOCK_T"]),),
        x, cos, sin, cos if weight is None else weight, y, T, H, *(s // constants["ALIGN"] for s in x.stride()[:2]), eps,
        config=config, BACK=back, NORM=weight is not None, **constants,
    )  # fmt: skip
    return y


def launch_norm_backward(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx [T, H, D] in x's dtype and dweight [D] in weight's."""
    (T, H, D), half = x.shape, cos.shape[1]
    config = configuration("rotary_norm_backward", H * D, x)
    programs = cdiv(T, config.tiles["ROWS"])
    dx, partial = x.new_empty(T, H, D), x.new_empty(programs, D, dtype=torch.float32)
    strides = (*dy.stride()[:2], *x.stride()[:2])
    constants = _constants(D, half, H, config.tiles["BLOCK_H"], strides)
    launch(
        "rotary_norm_backward", _norm_backward_kernel, (programs,),
        dy, x, cos, sin, weight, dx, partial, T, H, *(s // constants["ALIGN"] for s in strides), eps, config=config, **constants,
    )  # fmt: skip
    return dx, column_sum(partial, weight.dtype)


def torch_rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, back: bool) -> Tensor:
    """What :func:`launch_rotate` returns, in plain torch and any float dtype."""
    wide, half = _wide(x, cos), cos.shape[1]
    n = x.to(wide)
    if weight is not None:
        n = (n * _inverse(n, eps)).mul_(weight.to(wide))
    cos, sin, sign = cos.to(wide)[:, None], sin.to(wide)[:, None], -1 if back else 1
    y = n.new_empty(n.shape)
    # Views cost more than the arithmetic where tensors are small.
    first, second, *rest = n.split([half, half, n.shape[-1] - 2 * half] if 2 * half < n.shape[-1] else half, -1)
    y_first, y_second, *y_rest = y.split([half, half, n.shape[-1] - 2 * half] if rest else half, -1)
    torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=y_second).addcmul_(first, sin, value=sign)
    if rest:
        y_rest[0].copy_(rest[0])
    return y.to(x.dtype)


def torch_norm_backward(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What :func:`launch_norm_backward` returns, in plain torch and any float dtype."""
    wide = _wide(x, cos)
    rsqrt = _inverse(x.to(wide), eps)
    n, g = x.to(wide) * rsqrt, torch_rotate(dy.to(wide), cos, sin, None, eps, True)
    dn = g * weight.to(wide)
    dx = dn.addcmul(n, (dn * n).mean(-1, keepdim=True), value=-1).mul_(rsqrt)
    return dx.to(x.dtype), (g * n).sum((0, 1)).to(weight.dtype)


def _inverse(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _compute(x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, eps: float, implementation: str) -> Tensor:
    rotate = launch_rotate if runs_kernel(implementation, x, MAX_HEAD_DIM) else torch_rotate
    return rotate(unit_stride(x), cos.contiguous(), sin.contiguous(), norm_weight, eps, False)


_rotary = torch.library.custom_op("smalt::rotary", mutates_args=())(_compute)


@_rotary.register_fake
def _(x, cos, sin, norm_weight, eps, implementation):
    return x.new_empty(x.shape)


def _gradient(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, norm_weight: Tensor | None, eps: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """dx, and dweight, of no elements without a norm."""
    kernel, cos, sin = runs_kernel(implementation, dy, MAX_HEAD_DIM), cos.contiguous(), sin.contiguous()
    if x is None or norm_weight is None:
        rotate = launch_rotate if kernel else torch_rotate
        return rotate(unit_stride(dy), cos, sin, None, eps, True), dy.new_empty(0)
    backward = launch_norm_backward if kernel else torch_norm_backward
    return backward(unit_stride(dy), unit_stride(x), cos, sin, norm_weight, eps)


_rotary_backward = torch.library.custom_op("smalt::rotary_backward", mutates_args=())(_gradient)


@_rotary_backward.register_fake
def _(dy, x, cos, sin, norm_weight, eps, implementation):
    return dy.new_empty(dy.shape), dy.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape)


_differentiate = without_dispatcher(_rotary_backward, _gradient)


def _setup(ctx, inputs, output):
    x, cos, sin, norm_weight, ctx.eps, ctx.implementation = inputs
    ctx.save_for_backward(x if norm_weight is not None else None, cos, sin, norm_weight)


def _backward(ctx, dy):
    x, cos, sin, norm_weight = ctx.saved_tensors
    dx, dweight = _differentiate(dy, x, cos, sin, norm_weight, ctx.eps, ctx.implementation)
    return dx, None, None, None if norm_weight is None else dweight, None, None


_rotary.register_autograd(_backward, setup_context=_setup)
_call = differentiable(_rotary, _compute, _setup, _backward)
