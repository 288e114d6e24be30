"""Matrix product whose rows do not know of each other: a row has the same bits alone, in any company and at any position.

    y[t, n] = sum_k x[t, k] weight[n, k] + bias[n],   k in blocks of BLOCK_K, one block after another

The idea, batch invariance: He et al. 2025, "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab). A product is
formed in fp32 and rounded once. The tiles depend on the chip, the dtype and the size of the weight, never on the number of rows,
and no sum is split between programs. So generation, row by row, computes what training computes in one pass. The gradients:

    dx = dy weight            the same kernel on the transposed weight: its rows are as independent
    dw[n, k] = sum_t dy[t, n] x[t, k],   db[n] = sum_t dy[t, n]   over all rows in their order: the same bits every time

What is guaranteed. ``triton``: all of it, as long as a matrix instruction treats every row of its tile in the same way; rows that
begin on another alignment are loaded otherwise, and multiplied by the same instructions in the same order. ``torch``: every call
of BLAS has the same shape, strides and alignment: BLOCK rows, zeros where there are fewer. What remains is that BLAS treats the
rows of one block alike, and that the number of threads stays; the tests show the first on the machine that they run on, for fp32,
fp16, bf16 and float64. Rows padded to a multiple of 32, and nothing else, are not enough: MKL's order of summation depends on
where its operands lie and on their number of rows (float64 with an odd length; fp32 with one column), oneDNN's on the strides
(bf16, fp16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .column_sum import column_sum
from .dispatch import current_backend, differentiable, runs_kernel, without_autocast, without_dispatcher
from .launch import as_rows, cdiv, configuration, constexpr, convert, dot, jit, launch, precision, tl

# Row blocks that share one pass over the weight while it is in the L2 cache.
GROUP = constexpr(8)
# torch: rows of a block, and what its lengths are padded to; 32 elements of two bytes are the 64 bytes that BLAS aligns to.
BLOCK = 32


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, row by row independent of the other rows; differentiable in x, weight and bias.

    x: [..., K] of any strides; weight: [N, K], as of nn.Linear; bias: [N]; all of one float dtype. Returns [..., N] in it.
    Raises ValueError when the shapes or the dtypes do not fit.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        added = "" if bias is None else f", bias {tuple(bias.shape)}"
        raise ValueError(f"matmul: x {tuple(x.shape)}, weight {tuple(weight.shape)}{added}; expected [..., K], [N, K] and [N]")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        added = "" if bias is None else f", bias {bias.dtype}"
        raise ValueError(f"matmul: x {x.dtype}, weight {weight.dtype}{added}; expected one dtype")
    implementation = current_backend(x)
    if implementation == "reference":
        return matmul_reference(x, weight, bias)
    return _call(x, weight, bias, implementation)


def matmul_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition; nothing is promised of its bits."""
    with without_autocast(x):
        return F.linear(x, weight, bias)


@jit
def _tile(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Which tile a program computes: down GROUP blocks of rows, then on to the next block of columns."""
    row_blocks, column_blocks = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_columns, BLOCK_COLUMNS)
    group, place = tl.program_id(0) // (GROUP * column_blocks), tl.program_id(0) % (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    return group * GROUP + place % height, place // height


# A generation step of a few rows computes BLOCK_T of them: it waits for the weight anyway, which is read once.
@jit(varying=("num_rows",))
def _kernel(
    x, weight, bias, out, num_rows, num_columns, depth, x_stride, column_stride, depth_stride,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_block, column_block = _tile(num_rows, num_columns, BLOCK_T, BLOCK_N)
    t = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    row, column = (t < num_rows)[:, None], (n < num_columns)[None, :]
    x += t[:, None] * x_stride + k[None, :]
    weight += k[:, None] * depth_stride + n[None, :] * column_stride
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        inside = k < depth - first
        a = tl.load(x, mask=row & inside[None, :], other=0.0)
        b = tl.load(weight, mask=inside[:, None] & column, other=0.0)
        total = dot(a, b, total, PRECISION)
        x += BLOCK_K
        weight += tl.cast(BLOCK_K, tl.int64) * depth_stride
    if BIAS:
        total += tl.load(bias + n, mask=n < num_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + t[:, None] * num_columns + n[None, :], convert(total, out.dtype.element_ty), mask=row & column)


@jit(varying=("num_rows",))
def _weight_kernel(
    dy, x, dw, num_rows, num_columns, depth, dy_stride, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column_block, depth_block = _tile(num_columns, depth, BLOCK_N, BLOCK_K)
    n = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = depth_block.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    column, deep = (n < num_columns)[:, None], (k < depth)[None, :]
    dy += n[:, None] + t[None, :] * dy_stride
    x += t[:, None] * x_stride + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, num_rows, BLOCK_T):
        inside = t < num_rows - first
        a = tl.load(dy, mask=column & inside[None, :], other=0.0)
        b = tl.load(x, mask=inside[:, None] & deep, other=0.0)
        total = dot(a, b, total, PRECISION)
        dy += tl.cast(BLOCK_T, tl.int64) * dy_stride
        x += tl.cast(BLOCK_T, tl.int64) * x_stride
    tl.store(dw + n[:, None] * depth + k[None, :], convert(total, dw.dtype.element_ty), mask=column & deep)


@jit(varying=("num_rows",))
def _bias_kernel(
    dy, partial, num_rows, num_columns, dy_stride, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, ROWS, BLOCK_T):
        t = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, BLOCK_T)
        inside = (t < num_rows)[:, None] & (n < num_columns)[None, :]
        total += tl.sum(tl.load(dy + t[:, None] * dy_stride + n[None, :], mask=inside, other=0.0).to(tl.float32), axis=0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * num_columns + n, total, mask=n < num_columns)


def launch_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, N] of x [T, K], whose rows are contiguous, and weight [N, K]."""
    (T, K), N = x.shape, weight.shape[0]
    weight = weight if 1 in weight.stride() else weight.contiguous()
    out = x.new_empty(T, N)
    config = configuration("matmul", N, x)
    launch(
        "matmul", _kernel, (cdiv(T, config.tiles["BLOCK_T"]) * cdiv(N, config.tiles["BLOCK_N"]),),
        x, weight, weight if bias is None else bias, out, T, N, K, x.stride(0), weight.stride(0), weight.stride(1),
        config=config, BIAS=bias is not None, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return out


def forward_traffic(T: int, N: int, K: int, itemsize: int, tiles: dict[str, int], bias: bool) -> int:
    """Bytes that the kernel loads and stores: x once a block of columns, weight and bias once a block of rows, the result once."""
    row_blocks, column_blocks = cdiv(T, tiles["BLOCK_T"]), cdiv(N, tiles["BLOCK_N"])
    return (T * K * column_blocks + (N * K + N * bias) * row_blocks + T * N) * itemsize


def launch_weight(dy: Tensor, x: Tensor) -> Tensor:
    """dw [N, K] of dy [T, N] and x [T, K], whose rows are contiguous."""
    (T, N), K = dy.shape, x.shape[1]
    dw = x.new_empty(N, K)
    config = configuration("matmul_weight", K, x)
    launch(
        "matmul_weight", _weight_kernel, (cdiv(N, config.tiles["BLOCK_N"]) * cdiv(K, config.tiles["BLOCK_K"]),),
        dy, x, dw, T, N, K, dy.stride(0), x.stride(0), config=config, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return dw


def launch_bias(dy: Tensor) -> Tensor:
    """db [N] of dy [T, N], whose rows are contiguous."""
    T, N = dy.shape
    config = configuration("matmul_bias", N, dy)
    programs = cdiv(T, config.tiles["ROWS"])
    partial = dy.new_empty(programs, N, dtype=torch.float32)
    grid = (programs, cdiv(N, config.tiles["BLOCK_N"]))
    launch("matmul_bias", _bias_kernel, grid, dy, partial, T, N, dy.stride(0), config=config)
    return column_sum(partial, dy.dtype)


def torch_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What :func:`launch_matmul` returns, in plain torch and any float dtype."""
    T, N = x.shape[0], weight.shape[0]
    x, weight = _padded(x), _padded(weight)
    out = x.new_empty(x.shape[0], weight.shape[0])
    if bias is not None:
        bias = F.pad(bias, (0, -N % BLOCK))
    for low in range(0, T, BLOCK):
        block, rows = x[low : low + BLOCK], out[low : low + BLOCK]
        if bias is None:
            torch.mm(block, weight.t(), out=rows)
        else:
            torch.addmm(bias, block, weight.t(), out=rows)
    return out[:T, :N].contiguous()


def torch_weight(dy: Tensor, x: Tensor) -> Tensor:
    """What :func:`launch_weight` returns, in plain torch and any float dtype."""
    N, K = dy.shape[1], x.shape[1]
    return (_padded(dy).t() @ _padded(x))[:N, :K].contiguous()


def torch_bias(dy: Tensor) -> Tensor:
    """What :func:`launch_bias` returns, in plain torch and any float dtype."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dy.dtype)


def _padded(x: Tensor) -> Tensor:
    """A matrix with zeros up to a multiple of BLOCK in both dims: contiguous, its rows on 64 bytes. x itself where it is so."""
    T, D = x.shape
    if x.is_contiguous() and T % BLOCK == D % BLOCK == 0 and x.data_ptr() % 64 == 0:
        return x
    out = x.new_zeros(cdiv(T, BLOCK) * BLOCK, cdiv(D, BLOCK) * BLOCK)
    out[:T, :D] = x
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, implementation: str) -> Tensor:
    product = launch_matmul if runs_kernel(implementation, x) else torch_matmul
    return product(as_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


_matmul = torch.library.custom_op("smalt::matmul", mutates_args=())(_product)


@_matmul.register_fake
def _(x, weight, bias, implementation):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _weight_gradient(dy: Tensor, x: Tensor, implementation: str) -> Tensor:
    gradient = launch_weight if runs_kernel(implementation, x) else torch_weight
    return gradient(as_rows(dy), as_rows(x))


_matmul_weight = torch.library.custom_op("smalt::matmul_weight", mutates_args=())(_weight_gradient)


@_matmul_weight.register_fake
def _(dy, x, implementation):
    return x.new_empty(dy.shape[-1], x.shape[-1])


def _bias_gradient(dy: Tensor, implementation: str) -> Tensor:
    gradient = launch_bias if runs_kernel(implementation, dy) else torch_bias
    return gradient(as_rows(dy))


_matmul_bias = torch.library.custom_op("smalt::matmul_bias", mutates_args=())(_bias_gradient)


@_matmul_bias.register_fake
def _(dy, implementation):
    return dy.new_empty(dy.shape[-1])


_multiply = without_dispatcher(_matmul, _product)
_differentiate_weight = without_dispatcher(_matmul_weight, _weight_gradient)
_differentiate_bias = without_dispatcher(_matmul_bias, _bias_gradient)


def _setup(ctx, inputs, output):
    x, weight, _, ctx.implementation = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = _multiply(dy, weight.t(), None, ctx.implementation) if wanted[0] else None
    dw = _differentiate_weight(dy, x, ctx.implementation) if wanted[1] else None
    db = _differentiate_bias(dy, ctx.implementation) if wanted[2] else None
    return dx, dw, db, None


_matmul.register_autograd(_backward, setup_context=_setup)
_call = differentiable(_matmul, _product, _setup, _backward)
