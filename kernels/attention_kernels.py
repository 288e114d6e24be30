"""The Triton kernels of :mod:`smalt.kernels.attention`, which has the formulas: forward, dq, and dk with dv.

Each walks the blocks that its tile sees in three runs: from first to a masked, to b whole, to stop masked. A tile that holds several
documents walks them one by one, all masked. A head dim that is no power of two is cut in two parts, D1 + D2 (72 = 64 + 16, of which
8 are used), instead of being padded to the next one. Strides along the walk are constants, so that a loop has one address for all
its loads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import (
    cdiv,
    configuration,
    constexpr,
    convert,
    dot,
    jit,
    launch,
    next_power_of_two,
    precision,
    tanh,
    tl,
    unit_stride,
)

MAX_HEAD_DIM = 256
LOG2E = constexpr(1.4426950408889634)
LN2 = constexpr(0.6931471805599453)
NO_DOCUMENT = constexpr(2**31 - 1)


@jit
def load_part(x, row, inside, first: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Columns first .. first + WIDTH of the rows at these offsets; zero past D, and where a row is not inside."""
    d = first + tl.arange(0, WIDTH)
    pointers = x + row[:, None] + d[None, :]
    if first + WIDTH > D:
        if MASKED:
            return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    return tl.load(pointers)


@jit
def store_part(x, row, inside, value, first: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    d = first + tl.arange(0, WIDTH)
    tl.store(x + row[:, None] + d[None, :], convert(value, x.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@jit
def _product(
    x1, x2, x, x_row, x_inside, y1, y2, y, y_row, y_inside, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    CUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[M, N] products of the rows of two tiles, of which the parts are there (x1, x2; y1, y2).

    With CUT they are read again, so many columns at a time: exact products of fp32 are unrolled, and those of whole heads would
    need more operands at once than there are registers.
    """
    z = tl.zeros([M, N], tl.float32)
    if CUT:
        for first in range(0, D, CUT):
            z = dot(_load_cut(x, x_row, x_inside, first, CUT, D, True),
                    tl.trans(_load_cut(y, y_row, y_inside, first, CUT, D, MASKED)), z, PRECISION)  # fmt: skip
    else:
        z = dot(x1, tl.trans(y1), z, PRECISION)
        if D2:
            z = dot(x2, tl.trans(y2), z, PRECISION)
    return z


@jit
def _load_cut(x, row, inside, first, CUT: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Like load_part, of columns that the compiler does not know."""
    d = first + tl.arange(0, CUT)
    pointers = x + row[:, None] + d[None, :]
    if D % CUT:
        return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    return tl.load(pointers)


@jit
def _bounds(intervals, i, num):
    """Interval and document of the members i of a tile; those that see nothing, or lie past the end, are of no document."""
    inside = i < num
    start = tl.load(intervals + i, mask=inside, other=0)
    end = tl.load(intervals + num + i, mask=inside, other=0)
    origin = tl.load(intervals + 2 * num + i, mask=inside, other=0)
    return start, end, tl.where(start < end, origin, NO_DOCUMENT)


@jit
def _walk(start, end, origin, document, BLOCK: tl.constexpr):
    """The blocks that the members of a document see: from first, whole from a to b, to stop; and how much each member sees.

    Blocks count from the document's origin. Those from a to b are seen whole by every member of the tile, and need no mask;
    there are none if the tile holds more than this document.
    """
    mine = origin == document
    first = document + (tl.min(tl.where(mine, start, NO_DOCUMENT)) - document) // BLOCK * BLOCK
    stop = tl.max(tl.where(mine, end, 0))
    a = tl.minimum(document + tl.cdiv(tl.max(tl.where(mine, start, document)) - document, BLOCK) * BLOCK, stop)
    b = document + (tl.min(tl.where(mine, end, 0)) - document) // BLOCK * BLOCK
    return first, a, tl.maximum(a, b), stop, tl.where(mine, end - start, 0)


@jit
def _next_document(origin, document):
    return tl.min(tl.where(origin > document, origin, NO_DOCUMENT))


@jit
def _sees(i, start, length):
    """start <= i < start + length by one comparison."""
    return (i - start).to(tl.uint32, bitcast=True) < length.to(tl.uint32, bitcast=True)


@jit
def _power(x, DTYPE: tl.constexpr):
    """The exponential, of base 2 for 16 bits, which saves a multiplication; of base e for fp32, where scores of several hundred would
    lose digits to the change of base, and back."""
    return tl.exp(x) if DTYPE == tl.float32 else tl.exp2(x)


@jit
def _log2e(DTYPE: tl.constexpr):
    return 1.0 if DTYPE == tl.float32 else LOG2E


@jit
def log_sum(m, norm, DTYPE: tl.constexpr):
    """The log-sum-exp, of base e, of a running maximum and sum."""
    return m + tl.log(norm) if DTYPE == tl.float32 else (m + tl.log2(norm)) * LN2


@jit
def _score(product, scale, softcap, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    """z in units of the base of the exponential, still to be multiplied by :func:`_unit`."""
    if SOFTCAP:
        if DTYPE == tl.float32:
            return softcap * tanh(product * (scale / softcap))
        # Fewer instructions, and wrong by one rounding of the cap instead of one of the score, which 16 bits do not show.
        return softcap * LOG2E * (1.0 - 2.0 / (tl.exp2(product * (scale / softcap * 2.0 * LOG2E)) + 1.0))
    return product


@jit
def _unit(scale, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    return 1.0 if SOFTCAP else scale * _log2e(DTYPE)


@jit
def forward_step(
    n, q1, q2, q, q_row, q_inside, k, v, start, length, stop, m, l, acc1, acc2, scale, softcap,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys n .. n + BLOCK_N into the running maximum m, sum l and output of a tile of rows."""
    key = n + tl.arange(0, BLOCK_N)
    inside = key < stop
    k_row, v_row = key.to(tl.int64) * K_STRIDE, key.to(tl.int64) * V_STRIDE
    k1 = q1 if CUT else load_part(k, k_row, inside, 0, D1, D, MASKED)
    k2 = load_part(k, k_row, inside, D1, D2, D, MASKED) if D2 and not CUT else k1
    z = _product(q1, q2, q, q_row, q_inside, k1, k2, k, k_row, inside, BLOCK_M, BLOCK_N, D, D2, CUT, PRECISION, MASKED)
    z = _score(z, scale, softcap, SOFTCAP, k.dtype.element_ty)
    if MASKED:
        z = tl.where(_sees(key[None, :], start[:, None], length[:, None]), z, float("-inf"))
    unit = _unit(scale, SOFTCAP, k.dtype.element_ty)
    m_new = tl.maximum(m, tl.max(z, 1) * unit)
    p = _power(z * unit - m_new[:, None], k.dtype.element_ty)
    alpha = _power(m - m_new, k.dtype.element_ty)
    l = l * alpha + tl.sum(p, 1)
    p = convert(p, v.dtype.element_ty)
    acc1 = dot(p, load_part(v, v_row, inside, 0, D1, D, MASKED), acc1 * alpha[:, None], PRECISION)
    if D2:
        acc2 = dot(p, load_part(v, v_row, inside, D1, D2, D, MASKED), acc2 * alpha[:, None], PRECISION)
    return m_new, l, acc1, acc2


@jit(varying=("num_rows",))
def _forward_kernel(
    q, k, v, rows, out, lse, num_rows, groups, scale, softcap, q_strides, k_head_stride, v_head_stride,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Late rows of a document see most: they go first, and the short ones fill the gaps at the end.
    t = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    start, end, origin = _bounds(rows, t, num_rows)
    inside = t < num_rows
    q_row = (head * q_strides[1] + t.to(tl.int64) * q_strides[0]) * ALIGN
    q1 = load_part(q, q_row, inside, 0, D1, D, True)
    q2 = load_part(q, q_row, inside, D1, D2, D, True) if D2 else q1
    k += head // groups * k_head_stride * ALIGN
    v += head // groups * v_head_stride * ALIGN
    m = tl.full([BLOCK_M], -1e30, tl.float32)  # not -inf, whose difference with itself is not 0
    l = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 else 1], tl.float32)
    document = tl.min(origin)
    while document < NO_DOCUMENT:
        first, a, b, stop, length = _walk(start, end, origin, document, BLOCK_N)
        borders = (first, a, b, stop)
        for run in tl.static_range(3):
            for n in range(borders[run], borders[run + 1], BLOCK_N):
                m, l, acc1, acc2 = forward_step(
                    n, q1, q2, q, q_row, inside, k, v, start, length, stop, m, l, acc1, acc2, scale, softcap,
                    K_STRIDE, V_STRIDE, D, D1, D2, CUT, BLOCK_M, BLOCK_N, SOFTCAP, PRECISION, run != 1)  # fmt: skip
        document = _next_document(origin, document)
    seen = l != 0  # NaN was seen
    norm = tl.where(seen, l, 1.0)
    out_row = (t.to(tl.int64) * tl.num_programs(1) + head) * D
    store_part(out, out_row, inside, acc1 / norm[:, None], 0, D1, D)
    if D2:
        store_part(out, out_row, inside, acc2 / norm[:, None], D1, D2, D)
    tl.store(lse + head * num_rows + t, tl.where(seen, log_sum(m, norm, k.dtype.element_ty), float("-inf")), mask=inside)


@jit
def _gradient(z, dp, lse, delta, sees, scale, softcap, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """P, and the gradient of the products, of a tile of products z and of dP; lse in units of :func:`_power`."""
    z = _score(z, scale, softcap, SOFTCAP, DTYPE)
    p = _power(z * _unit(scale, SOFTCAP, DTYPE) - lse, DTYPE)
    if MASKED:
        p = tl.where(sees, p, 0.0)
    dz = p * (dp - delta)
    if SOFTCAP:
        capped = z / (softcap * _log2e(DTYPE))
        dz *= 1.0 - capped * capped
    return p, dz


@jit
def _dq_step(
    n, q1, q2, do1, do2, q, q_row, dout, do_row, q_inside, k, v, start, length, stop, lse, delta, dq1, dq2, scale, softcap,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the keys n .. n + BLOCK_N add to dq / scale of a tile of rows."""
    key = n + tl.arange(0, BLOCK_N)
    inside = key < stop
    k_row, v_row = key.to(tl.int64) * K_STRIDE, key.to(tl.int64) * V_STRIDE
    k1 = load_part(k, k_row, inside, 0, D1, D, MASKED)
    k2 = load_part(k, k_row, inside, D1, D2, D, MASKED) if D2 else k1
    v1 = do1 if CUT else load_part(v, v_row, inside, 0, D1, D, MASKED)
    v2 = load_part(v, v_row, inside, D1, D2, D, MASKED) if D2 and not CUT else v1
    z = _product(q1, q2, q, q_row, q_inside, k1, k2, k, k_row, inside, BLOCK_M, BLOCK_N, D, D2, CUT, PRECISION, MASKED)
    dp = _product(do1, do2, dout, do_row, q_inside, v1, v2, v, v_row, inside, BLOCK_M, BLOCK_N, D, D2, CUT, PRECISION, MASKED)
    sees = _sees(key[None, :], start[:, None], length[:, None])
    _, dz = _gradient(z, dp, lse[:, None], delta[:, None], sees, scale, softcap, SOFTCAP, k.dtype.element_ty, MASKED)
    dz = convert(dz, k.dtype.element_ty)
    dq1 = dot(dz, k1, dq1, PRECISION)
    if D2:
        dq2 = dot(dz, k2, dq2, PRECISION)
    return dq1, dq2


@jit(varying=("num_rows",))
def _dq_kernel(
    q, k, v, rows, out, lse, dout, dlse, terms, dq, num_rows, groups, scale, softcap,
    q_strides, dout_strides, k_head_stride, v_head_stride,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    start, end, origin = _bounds(rows, t, num_rows)
    inside, seen = t < num_rows, start < end  # of a row that sees nothing the upstream gradient may be anything
    q_row = (head * q_strides[1] + t.to(tl.int64) * q_strides[0]) * ALIGN
    do_row = (head * dout_strides[1] + t.to(tl.int64) * dout_strides[0]) * ALIGN
    out_row = (t.to(tl.int64) * tl.num_programs(1) + head) * D
    q1, do1 = load_part(q, q_row, inside, 0, D1, D, True), load_part(dout, do_row, seen, 0, D1, D, True)
    drop = tl.sum(load_part(out, out_row, inside, 0, D1, D, True).to(tl.float32) * do1.to(tl.float32), 1)
    q2, do2 = q1, do1
    if D2:
        q2, do2 = load_part(q, q_row, inside, D1, D2, D, True), load_part(dout, do_row, seen, D1, D2, D, True)
        drop += tl.sum(load_part(out, out_row, inside, D1, D2, D, True).to(tl.float32) * do2.to(tl.float32), 1)
    drop -= tl.load(dlse + head * num_rows + t, mask=seen, other=0.0)
    row_lse = tl.load(lse + head * num_rows + t, mask=inside, other=0.0) * _log2e(k.dtype.element_ty)
    # What the other kernel needs of each row.
    tl.store(terms + head * num_rows + t, row_lse, mask=inside)
    tl.store(terms + (tl.num_programs(1) + head) * num_rows + t, drop, mask=inside)
    k += head // groups * k_head_stride * ALIGN
    v += head // groups * v_head_stride * ALIGN
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = tl.zeros([BLOCK_M, D2 if D2 else 1], tl.float32)
    document = tl.min(origin)
    while document < NO_DOCUMENT:
        first, a, b, stop, length = _walk(start, end, origin, document, BLOCK_N)
        borders = (first, a, b, stop)
        for run in tl.static_range(3):
            for n in range(borders[run], borders[run + 1], BLOCK_N):
                dq1, dq2 = _dq_step(
                    n, q1, q2, do1, do2, q, q_row, dout, do_row, seen, k, v, start, length, stop, row_lse, drop,
                    dq1, dq2, scale, softcap,
                    K_STRIDE, V_STRIDE, D, D1, D2, CUT, BLOCK_M, BLOCK_N, SOFTCAP, PRECISION, run != 1)  # fmt: skip
        document = _next_document(origin, document)
    store_part(dq, out_row, inside, dq1 * scale, 0, D1, D)
    if D2:
        store_part(dq, out_row, inside, dq2 * scale, D1, D2, D)


@jit
def _dkv_step(
    m, k1, k2, v1, v2, k, k_row, v, v_row, k_inside, q, dout, lse, delta, start, length, stop, dk1, dk2, dv1, dv2, scale, softcap,
    Q_STRIDE: tl.constexpr, DO_STRIDE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the rows m .. m + BLOCK_M add to dk / scale and dv of a tile of keys. Scores stand transposed, keys by rows."""
    t = m + tl.arange(0, BLOCK_M)
    inside = t < stop
    q_row, do_row = t.to(tl.int64) * Q_STRIDE, t.to(tl.int64) * DO_STRIDE
    q1, do1 = load_part(q, q_row, inside, 0, D1, D, MASKED), load_part(dout, do_row, inside, 0, D1, D, MASKED)
    q2, do2 = q1, do1
    if D2:
        q2, do2 = load_part(q, q_row, inside, D1, D2, D, MASKED), load_part(dout, do_row, inside, D1, D2, D, MASKED)
    z = _product(k1, k2, k, k_row, k_inside, q1, q2, q, q_row, inside, BLOCK_N, BLOCK_M, D, D2, CUT, PRECISION, MASKED)
    dp = _product(v1, v2, v, v_row, k_inside, do1, do2, dout, do_row, inside, BLOCK_N, BLOCK_M, D, D2, CUT, PRECISION, MASKED)
    row_lse = tl.load(lse + t, mask=inside, other=0.0) if MASKED else tl.load(lse + t)
    drop = tl.load(delta + t, mask=inside, other=0.0) if MASKED else tl.load(delta + t)
    sees = _sees(t[None, :], start[:, None], length[:, None])
    p, dz = _gradient(z, dp, row_lse[None, :], drop[None, :], sees, scale, softcap, SOFTCAP, q.dtype.element_ty, MASKED)
    p, dz = convert(p, q.dtype.element_ty), convert(dz, q.dtype.element_ty)
    dv1 = dot(p, do1, dv1, PRECISION)
    dk1 = dot(dz, q1, dk1, PRECISION)
    if D2:
        dv2 = dot(p, do2, dv2, PRECISION)
        dk2 = dot(dz, q2, dk2, PRECISION)
    return dk1, dk2, dv1, dv2


@jit(varying=("num_rows", "num_keys"))
def _dkv_kernel(
    q, k, v, keys, dout, terms, dk, dv, num_rows, num_keys, groups, scale, softcap,
    k_strides, v_strides, q_head_stride, dout_head_stride,
    Q_STRIDE: tl.constexpr, DO_STRIDE: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kv_head = tl.program_id(1).to(tl.int64)
    start, end, origin = _bounds(keys, n, num_keys)
    inside = n < num_keys
    k_row = (kv_head * k_strides[1] + n.to(tl.int64) * k_strides[0]) * ALIGN
    v_row = (kv_head * v_strides[1] + n.to(tl.int64) * v_strides[0]) * ALIGN
    k1, v1 = load_part(k, k_row, inside, 0, D1, D, True), load_part(v, v_row, inside, 0, D1, D, True)
    k2, v2 = k1, v1
    if D2:
        k2, v2 = load_part(k, k_row, inside, D1, D2, D, True), load_part(v, v_row, inside, D1, D2, D, True)
    dk1, dv1 = tl.zeros([BLOCK_N, D1], tl.float32), tl.zeros([BLOCK_N, D1], tl.float32)
    dk2, dv2 = tl.zeros([BLOCK_N, D2 if D2 else 1], tl.float32), tl.zeros([BLOCK_N, D2 if D2 else 1], tl.float32)
    for g in range(groups):
        head = kv_head * groups + g
        q_head, do_head = q + head * q_head_stride * ALIGN, dout + head * dout_head_stride * ALIGN
        lse = terms + head * num_rows
        delta = lse + tl.num_programs(1).to(tl.int64) * groups * num_rows
        document = tl.min(origin)
        while document < NO_DOCUMENT:
            first, a, b, stop, length = _walk(start, end, origin, document, BLOCK_M)
            borders = (first, a, b, stop)
            for run in tl.static_range(3):
                for m in range(borders[run], borders[run + 1], BLOCK_M):
                    dk1, dk2, dv1, dv2 = _dkv_step(
                        m, k1, k2, v1, v2, k, k_row, v, v_row, inside, q_head, do_head, lse, delta, start, length, stop,
                        dk1, dk2, dv1, dv2, scale, softcap,
                        Q_STRIDE, DO_STRIDE, D, D1, D2, CUT, BLOCK_M, BLOCK_N, SOFTCAP, PRECISION, run != 1)  # fmt: skip
            document = _next_document(origin, document)
    dk_row = (n.to(tl.int64) * tl.num_programs(1) + kv_head) * D
    store_part(dk, dk_row, inside, dk1 * scale, 0, D1, D)
    store_part(dv, dk_row, inside, dv1, 0, D1, D)
    if D2:
        store_part(dk, dk_row, inside, dk2 * scale, D1, D2, D)
        store_part(dv, dk_row, inside, dv2, D1, D2, D)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T] in fp32. ``rows``: int32 [3, T], see :class:`smalt.kernels.attention.Intervals`."""
    (T, H, D), K = q.shape, k.shape[1]
    q, k, v = (unit_stride(x) for x in (q, k, v))
    out, lse = q.new_empty(T, H, D), q.new_empty(H, T, dtype=torch.float32)
    align, strides = aligned(*q.stride()[:2], k.stride(1), v.stride(1))
    name = _name("attention_forward", softcap)
    config = configuration(name, D, q)
    launch(
        name, _forward_kernel, (cdiv(T, config.tiles["BLOCK_M"]), H),
        q, k, v, rows, out, lse, T, H // K, scale, softcap, strides[:2], *strides[2:],
        config=config, K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), ALIGN=align, **constants(q, softcap),
    )  # fmt: skip
    return out, lse


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, each like its input but contiguous. ``keys``: int32 [3, S]; dlse: fp32 [H, T]."""
    (T, H, D), (S, K, _) = q.shape, k.shape
    q, k, v, dout = (unit_stride(x) for x in (q, k, v, dout))
    dq, dk, dv = q.new_empty(T, H, D), q.new_empty(S, K, D), q.new_empty(S, K, D)
    terms = lse.new_empty(2, H, T)
    fixed = constants(q, softcap)
    align, strides = aligned(*q.stride()[:2], *dout.stride()[:2], k.stride(1), v.stride(1))
    name = _name("attention_dq", softcap)
    config = configuration(name, D, q)
    launch(
        name, _dq_kernel, (cdiv(T, config.tiles["BLOCK_M"]), H),
        q, k, v, rows, out, lse, dout, dlse.contiguous(), terms, dq, T, H // K, scale, softcap,
        strides[:2], strides[2:4], *strides[4:],
        config=config, K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), ALIGN=align, **fixed,
    )  # fmt: skip
    align, strides = aligned(*k.stride()[:2], *v.stride()[:2], q.stride(1), dout.stride(1))
    name = _name("attention_dkv", softcap)
    config = configuration(name, D, q)
    launch(
        name, _dkv_kernel, (cdiv(S, config.tiles["BLOCK_N"]), K),
        q, k, v, keys, dout, terms, dk, dv, T, S, H // K, scale, softcap,
        strides[:2], strides[2:4], *strides[4:],
        config=config, Q_STRIDE=q.stride(0), DO_STRIDE=dout.stride(0), ALIGN=align, **fixed,
    )  # fmt: skip
    return dq, dk, dv


def _name(kernel: str, softcap: float) -> str:
    """In the launch table: a soft cap takes registers, and so tiles of its own."""
    return f"{kernel}_capped" if softcap else kernel


def forward_traffic(T: int, H: int, D: int, itemsize: int, tiles: dict[str, int]) -> int:
    """Bytes that the forward kernel loads and stores for one causal document of T rows, a multiple of BLOCK_M.

    Query rows, output, bounds and lse once; of keys and values, for each block of rows and each head, those up to its last row; in
    fp32 also, for each of their blocks, the query rows again.
    """
    n = T // tiles["BLOCK_M"]
    keys = tiles["BLOCK_M"] * n * (n + 1) // 2
    again = keys // tiles["BLOCK_N"] * tiles["BLOCK_M"] if itemsize == 4 else 0
    return H * (T * (2 * D * itemsize + 12 + 4) + (2 * keys + again) * D * itemsize)


def backward_traffic(T: int, H: int, K: int, D: int, itemsize: int, dq_tiles: dict[str, int], dkv_tiles: dict[str, int]) -> int:
    """Bytes that the two backward kernels load and store, as in :func:`forward_traffic`; T a multiple of all blocks, and BLOCK_N of
    dk and dv one of their BLOCK_M.

    dq: query rows, output and its gradient, dq, bounds, and four numbers a row once; keys and values as forward. dk and dv: keys,
    values, both gradients and bounds once; of query rows and output gradients, for each block of keys and each head, those from
    its first key on. In fp32, for each of these blocks: what the tile holds twice, and dq the keys, dk and dv both rows again.
    """
    n, m = T // dq_tiles["BLOCK_M"], T // dkv_tiles["BLOCK_N"]
    keys = dq_tiles["BLOCK_M"] * n * (n + 1) // 2
    rows = T * m - dkv_tiles["BLOCK_N"] * m * (m - 1) // 2
    dq_again = keys // dq_tiles["BLOCK_N"] * 2 * dq_tiles["BLOCK_M"] + keys if itemsize == 4 else 0
    dkv_again = rows // dkv_tiles["BLOCK_M"] * 2 * dkv_tiles["BLOCK_N"] + 2 * rows if itemsize == 4 else 0
    dq = H * (T * (4 * D * itemsize + 12 + 16) + (2 * keys + dq_again) * D * itemsize)
    return dq + K * T * (4 * D * itemsize + 12) + H * (rows * (2 * D * itemsize + 8) + dkv_again * D * itemsize)


def head_dim_parts(head_dim: int) -> tuple[int, int]:
    """D1 and D2: powers of two of at least 16 that hold the head dim, D2 = 0 where one is enough."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    return max(first, 16), next_power_of_two(max(rest, 16)) if rest and head_dim > 16 else 0


def aligned(*strides: int) -> tuple[int, tuple[int, ...]]:
    """A power of two that divides all strides, at most 16, and the strides divided by it.

    Triton sees of an integer only whether 16 divides it; 72 is a multiple of 8, which is enough to copy 16 bytes at once.
    """
    align = math.gcd(16, *strides)
    return align, tuple(s // align for s in strides)


def constants(q: Tensor, softcap: float) -> dict[str, object]:
    D1, D2 = head_dim_parts(q.shape[-1])
    cut = 16 if q.element_size() == 4 else 0
    return {"D": q.shape[-1], "D1": D1, "D2": D2, "CUT": cut, "SOFTCAP": softcap > 0, "PRECISION": precision(q.dtype)}
