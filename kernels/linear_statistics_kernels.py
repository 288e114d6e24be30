"""The Triton kernels of :mod:`smalt.kernels.linear_statistics`, which has the formulas: forward, merging, backward.

Forward: the vocabulary is cut into slices of SLICE words; a program forms the products of a block of rows with one slice tile by
tile and keeps running statistics; a second kernel merges the slices in order. A row's result depends neither on the other rows nor
on how many there are. Backward: for one chunk of words after another a kernel forms dx [T, words] anew, in hidden's dtype;
dweight[chunk] = dx^T hidden is then final, and dhidden += dx weight[chunk] is summed in fp32 in the order of the chunks. No locks,
no atomics, the same bits every time. These two products are torch's: they are large and plain, and there is nothing to fuse into
them that would pay for not using the vendor's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import IGNORE, backward_by_words, chunk_of_words, halves, place, product_tile, product_traffic, scaled, unscaled
from .launch import cdiv, configuration, constexpr, convert, jit, launch, precision, tl

_IGNORE = constexpr(IGNORE)


@jit
def own_word(label, first_word, num_words):
    """The labels as words of a shard, in 32 bits, -1 outside."""
    own = label - first_word
    return tl.where((own >= 0) & (own < num_words), own, -1).to(tl.int32)


# A slice is many tiles, so that partial results weigh little beside the products, and short enough for even waves of programs.
@jit(varying=("num_rows", "vocab_start"))
def _forward_kernel(
    hidden, weight, labels, partial, index, num_rows, num_words, width, hidden_stride, weight_stride, vocab_start,
    inverse_temperature, softcap,
    SLICE: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr, NLL_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tl.static_assert(SLICE % BLOCK_V == 0)
    block, part = place(num_rows, tl.cdiv(num_words, SLICE), BLOCK_T, GROUP)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    label = tl.load(labels + t, mask=t < num_rows, other=_IGNORE)
    own = own_word(label, vocab_start, num_words)[:, None]
    low = part * SLICE
    high = tl.minimum(low + SLICE, num_words)
    if NLL_ONLY:
        high = tl.where(tl.max((label != _IGNORE).to(tl.int32), axis=0) > 0, high, low)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total, target, weighted = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    best = tl.full([BLOCK_T], 0, tl.int32) + low
    for first in range(low, high, BLOCK_V):
        x = product_tile(
            hidden, weight, t, first + tl.arange(0, BLOCK_V), num_rows, num_words, width, hidden_stride, weight_stride,
            BLOCK_K, PRECISION,
        )  # fmt: skip
        both = halves(x)
        for half in tl.static_range(2):
            v = first + half * (BLOCK_V // 2) + tl.arange(0, BLOCK_V // 2)
            z = scaled(both[half], inverse_temperature, softcap, SOFTCAP)
            target += tl.sum(tl.where(v[None, :] == own, z, 0.0), axis=1)
            z = tl.where((v < num_words)[None, :], z, float("-inf"))
            here = tl.max(z, axis=1)
            if not NLL_ONLY:
                lowest = tl.min(tl.where(z == here[:, None], v[None, :], 0x7FFFFFFF), axis=1)
                best = tl.where(here > top, lowest, best)
            higher = tl.where(here > top, here, top)
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            fade, e = tl.exp(top - pivot), tl.exp(z - pivot[:, None])
            total = total * fade + tl.sum(e, axis=1)
            if not NLL_ONLY:
                weighted = weighted * fade + tl.sum(e * tl.where(e == 0.0, 0.0, z), axis=1)
            top = higher
    # [slice, statistic, row]
    out = partial + part.to(tl.int64) * (3 if NLL_ONLY else 4) * num_rows + t
    tl.store(out, top, mask=t < num_rows)
    tl.store(out + num_rows, total, mask=t < num_rows)
    tl.store(out + 2 * num_rows.to(tl.int64), target, mask=t < num_rows)
    if not NLL_ONLY:
        tl.store(out + 3 * num_rows.to(tl.int64), weighted, mask=t < num_rows)
        tl.store(index + part.to(tl.int64) * num_rows + t, best, mask=t < num_rows)


@jit(varying=("num_rows", "vocab_start"))
def _merge_kernel(
    partial, index, lse, target, mean, maximum, argmax, num_rows, num_parts, vocab_start,
    BLOCK_T: tl.constexpr, NLL_ONLY: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t < num_rows
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total, sum_target, weighted = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    best = tl.zeros([BLOCK_T], tl.int32)
    for part in range(num_parts):
        at = partial + tl.cast(part, tl.int64) * (3 if NLL_ONLY else 4) * num_rows + t
        here = tl.load(at, mask=row, other=float("-inf"))
        higher = tl.where(here > top, here, top)
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        fade, scale = tl.exp(top - pivot), tl.exp(here - pivot)
        total = total * fade + tl.load(at + num_rows, mask=row, other=0.0) * scale
        sum_target += tl.load(at + 2 * num_rows.to(tl.int64), mask=row, other=0.0)
        if not NLL_ONLY:
            weighted = weighted * fade + tl.load(at + 3 * num_rows.to(tl.int64), mask=row, other=0.0) * scale
            found = tl.load(index + tl.cast(part, tl.int64) * num_rows + t, mask=row, other=0)
            best = tl.where(here > top, found, best)
        top = higher
    # Nothing summed: a block without labels.
    tl.store(lse + t, tl.where(total == 0.0, top, top + tl.log(tl.where(total == 0.0, 1.0, total))), mask=row)
    tl.store(target + t, sum_target, mask=row)
    if not NLL_ONLY:
        tl.store(mean + t, weighted / tl.where(total == 0.0, 1.0, total), mask=row)
        tl.store(maximum + t, top, mask=row)
        tl.store(argmax + t, best.to(tl.int64) + vocab_start, mask=row)


# One tile to a program: the products of a chunk make waves enough.
@jit(varying=("num_rows", "first_word"))
def _backward_kernel(
    hidden, weight, labels, rows, dx, num_rows, num_words, width, hidden_stride, weight_stride, dx_stride, first_word,
    inverse_temperature, softcap,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr, MEAN: tl.constexpr, NLL_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, part = place(num_rows, tl.cdiv(num_words, BLOCK_V), BLOCK_T, GROUP)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t < num_rows
    label = tl.load(labels + t, mask=row, other=_IGNORE)
    if NLL_ONLY:
        width = tl.where(tl.max((label != _IGNORE).to(tl.int32), axis=0) > 0, width, 0)
    x = product_tile(
        hidden, weight, t, part * BLOCK_V + tl.arange(0, BLOCK_V), num_rows, num_words, width, hidden_stride, weight_stride,
        BLOCK_K, PRECISION,
    )  # fmt: skip
    both, n, own = halves(x), num_rows.to(tl.int64), own_word(label, first_word, num_words)[:, None]
    for half in tl.static_range(2):
        v = part * BLOCK_V + half * (BLOCK_V // 2) + tl.arange(0, BLOCK_V // 2)
        z = scaled(both[half], inverse_temperature, softcap, SOFTCAP)
        lse = tl.load(rows + t, mask=row, other=float("inf"))
        g_lse = tl.load(rows + n + t, mask=row, other=0.0)[:, None]
        g_target = tl.load(rows + 2 * n + t, mask=row, other=0.0)[:, None]
        p = tl.exp(z - lse[:, None])
        if NLL_ONLY:  # where one of the two passes skipped a block, p is anything
            p = tl.where((label == _IGNORE)[:, None], 0.0, p)
        if MEAN:
            mean = tl.load(rows + 3 * n + t, mask=row, other=0.0)[:, None]
            g_mean = tl.load(rows + 4 * n + t, mask=row, other=0.0)[:, None]
            g = tl.where(p == 0.0, 0.0, p * (g_lse + g_mean * (1.0 + (z - mean))))
        else:
            g = p * g_lse
        g += tl.where(v[None, :] == own, g_target, 0.0)
        g = convert(unscaled(g, z, inverse_temperature, softcap, SOFTCAP), dx.dtype.element_ty)
        tl.store(dx + t[:, None] * dx_stride + v[None, :], g, mask=row[:, None] & (v < num_words)[None, :])


def forward_traffic(T: int, V: int, D: int, itemsize: int, tiles: dict[str, int], nll_only: bool) -> int:
    """Bytes that the two forward kernels load and store, masked lanes left out, where no block of rows is skipped.

    Hidden states once a tile of words, weights once a block of rows; labels once a slice; the partial results of a slice are
    stored and loaded once.
    """
    products, _ = product_traffic(T, V, D, itemsize, tiles, tiles["SLICE"])
    partial, outputs = (3 * 4, 2 * 4) if nll_only else (4 * 4 + 4, 4 * 4 + 8)
    return products + T * (cdiv(V, tiles["SLICE"]) * (8 + 2 * partial) + outputs)


def backward_traffic(T: int, V: int, D: int, itemsize: int, tiles: dict[str, int], chunk: int, with_mean: bool) -> int:
    """Bytes that the backward kernel loads and stores over all chunks, counted likewise; torch's products not counted.

    Of a row the label once a tile of words, lse and upstream gradients once a half of it; dx once.
    """
    products, word_tiles = product_traffic(T, V, D, itemsize, tiles, chunk)
    return products + T * word_tiles * (8 + 2 * (5 if with_mean else 3) * 4) + T * V * itemsize


def launch_forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_start: int, temperature: float, softcap: float | None, nll_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, target, mean, maximum, argmax [T] of hidden [T, D] and weight [V, D] of one dtype, rows contiguous each.

    With nll_only the last three are of no rows, and lse may be -inf where there is no label.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    config = configuration("linear_statistics_forward", D, hidden)
    merge = configuration("linear_statistics_merge", D, hidden)
    slices, rest = cdiv(V, config.tiles["SLICE"]), 0 if nll_only else T
    partial = hidden.new_empty(slices, 3 if nll_only else 4, T, dtype=torch.float32)
    index = hidden.new_empty(slices, rest, dtype=torch.int32)
    lse, target = (hidden.new_empty(T, dtype=torch.float32) for _ in range(2))
    mean, maximum = (hidden.new_empty(rest, dtype=torch.float32) for _ in range(2))
    argmax = hidden.new_empty(rest, dtype=torch.int64)
    launch(
        "linear_statistics_forward", _forward_kernel, (cdiv(T, config.tiles["BLOCK_T"]) * slices,),
        hidden, weight, labels, partial, index, T, V, D, hidden.stride(0), weight.stride(0), vocab_start,
        1.0 / temperature, softcap or 0.0,
        config=config, SOFTCAP=softcap is not None, NLL_ONLY=nll_only, PRECISION=precision(hidden.dtype),
    )  # fmt: skip
    launch(
        "linear_statistics_merge", _merge_kernel, (cdiv(T, merge.tiles["BLOCK_T"]),),
        partial, index, lse, target, mean, maximum, argmax, T, slices, vocab_start,
        config=merge, NLL_ONLY=nll_only,
    )  # fmt: skip
    return lse, target, mean, maximum, argmax


def launch_backward(
    g_lse: Tensor, g_target: Tensor, g_mean: Tensor | None, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, mean: Tensor,
    vocab_start: int, temperature: float, softcap: float | None, nll_only: bool, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dhidden and dweight, each in its input's dtype; weight may be wider than hidden."""
    (T, D), V = hidden.shape, weight.shape[0]
    config = configuration("linear_statistics_backward", D, hidden)
    rows = torch.stack([lse, g_lse, g_target, *([] if g_mean is None else [mean, g_mean])])

    def write(dx: Tensor, words: Tensor, first: int) -> None:
        n = words.shape[0]
        launch(
            "linear_statistics_backward", _backward_kernel, (cdiv(T, config.tiles["BLOCK_T"]) * cdiv(n, config.tiles["BLOCK_V"]),),
            hidden, words, labels, rows, dx, T, n, D, hidden.stride(0), words.stride(0), dx.stride(0), vocab_start + first,
            1.0 / temperature, softcap or 0.0,
            config=config, SOFTCAP=softcap is not None, MEAN=g_mean is not None, NLL_ONLY=nll_only,
            PRECISION=precision(hidden.dtype),
        )  # fmt: skip

    chunk = chunk_of_words(V, hidden.element_size(), config.tiles["BLOCK_V"])
    return backward_by_words(write, hidden, weight, chunk, need_hidden, need_weight)
