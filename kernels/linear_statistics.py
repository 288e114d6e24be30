"""What every loss on a vocabulary is made of, from hidden states and the weight of the head, without logits in memory.

Of one row and the words v of a vocabulary, or of a shard of it, with c = softcap (x in place of c tanh(x / c) without one):

    x[v] = hidden . weight[v],   z[v] = c tanh(x[v] / c) / temperature,   p = softmax(z)
    lse = log sum_v exp(z[v]),   target = z[label],   mean = sum_v p[v] z[v],   maximum = max_v z[v],   argmax

The negative log-likelihood is lse - target, the entropy lse - mean. A label outside the shard has target 0, so that shards merge
by :func:`merge_statistics`. The gradient, for upstream gradients g of lse, target and mean:

    dz[v] = p[v] (g_lse + g_mean (1 + z[v] - mean)) + [v = label] g_target
    dx[v] = dz[v] (1 - tanh(x[v] / c)^2) / temperature

The kernels. Forward: the vocabulary is cut into slices of SLICE words; a program forms the products of a block of rows with one
slice tile by tile and keeps running statistics; a second kernel merges the slices in order. A row's result depends neither on the
other rows nor on how many there are. Backward: for one chunk of words after another a kernel forms dx [T, words] anew, in
hidden's dtype; dweight[chunk] = dx^T hidden is then final, and dhidden += dx weight[chunk] is summed in fp32 in the order of the
chunks. No locks, no atomics, the same bits every time. These two products are torch's: they are large and plain, and there is
nothing to fuse into them that would pay for not using the vendor's.

A head without logits in memory: Wijmans et al. 2024 (arXiv 2411.09009). Online softmax: Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import current_backend, differentiable, runs_kernel, without_dispatcher
from .head import (
    IGNORE,
    backward_by_rows,
    backward_by_words,
    cast_as_autocast_does,
    check_head,
    check_labels,
    chunk_of_words,
    halves,
    head_logits,
    pieces,
    place,
    product_tile,
    product_traffic,
    scaled,
    unscaled,
)
from .launch import as_rows, cdiv, configuration, constexpr, convert, jit, launch, precision, tl

_IGNORE = constexpr(IGNORE)


class HeadStatistics(NamedTuple):
    """Of each row of hidden states, over a vocabulary or a shard of it; fp32 [T] (fp64 for fp64 input), in nats.

    lse, target and mean are differentiable. Of a row without a label, ``nll`` and ``logprob`` mean nothing.
    """

    lse: Tensor
    target: Tensor  # 0 where the label is not in the shard
    mean: Tensor  # of the logits, under their softmax
    maximum: Tensor
    argmax: Tensor  # int64 [T], index in the whole vocabulary; the lowest of several

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the label."""
        return self.lse - self.target

    @property
    def logprob(self) -> Tensor:
        """Log-probability of the label."""
        return self.target - self.lse

    @property
    def entropy(self) -> Tensor:
        """Entropy of the softmax."""
        return self.lse - self.mean


def linear_statistics(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_start: int = 0,
    vocabulary: int | None = None,
) -> HeadStatistics:
    """What losses are made of, for every row, over one shard of the vocabulary; lse, target and mean are differentiable.

    hidden_TD: [T, D], cast first where autocast is on; weight_VD: [V, D], the words vocab_start .. vocab_start + V of
    ``vocabulary`` (by default none follow), of any float dtype, multiplied in hidden's; labels: int64 [T], a word of the whole
    vocabulary or ``IGNORE``. Raises ValueError when the shapes do not fit, temperature or softcap is not positive, or, on a CPU, a
    label is out of range.
    """
    check_head("linear_statistics", hidden_TD, weight_VD, labels, temperature, softcap)
    vocabulary = vocab_start + weight_VD.shape[0] if vocabulary is None else vocabulary
    if not 0 <= vocab_start <= vocabulary - weight_VD.shape[0]:
        raise ValueError(
            f"linear_statistics: {weight_VD.shape[0]} words from {vocab_start} on do not fit into a vocabulary of {vocabulary}"
        )
    check_labels("linear_statistics", labels, vocabulary)
    hidden_TD = cast_as_autocast_does(hidden_TD)
    implementation = current_backend(hidden_TD)
    if implementation == "reference":
        return linear_statistics_reference(hidden_TD, weight_VD, labels, vocab_start, temperature, softcap)
    outputs = statistics(hidden_TD, weight_VD, labels, vocab_start, temperature, softcap, False, implementation)
    return HeadStatistics(*outputs)


def merge_statistics(shards: Sequence[HeadStatistics]) -> HeadStatistics:
    """Statistics of the whole vocabulary from those of its shards, in the order of the words; differentiable.

    A shard whose lse is -inf counts for nothing. Raises ValueError without a shard.
    """
    if not shards:
        raise ValueError("merge_statistics: no shards")
    lses = torch.stack([shard.lse for shard in shards])
    dead = (lses == -torch.inf).all(0)
    lses = lses.masked_fill(dead, 0.0)  # or -inf - -inf would be NaN, here and in the gradient
    lse = lses.logsumexp(0)
    maximum, first = torch.stack([shard.maximum for shard in shards]).max(0)
    argmax = torch.stack([shard.argmax for shard in shards]).gather(0, first[None]).squeeze(0)
    target = torch.stack([shard.target for shard in shards]).sum(0)
    weights = (lses - lse).exp().masked_fill(dead, 0.0)
    mean = (weights * torch.stack([shard.mean for shard in shards])).sum(0)
    return HeadStatistics(lse.masked_fill(dead, -torch.inf), target, mean, maximum, argmax)


def linear_statistics_reference(
    hidden_TD: Tensor, weight_VD: Tensor, labels: Tensor, vocab_start: int, temperature: float, softcap: float | None
) -> HeadStatistics:
    """The definition, with all logits in memory. Arguments as in :func:`linear_statistics`."""
    z = head_logits(hidden_TD, weight_VD.to(hidden_TD.dtype), temperature, softcap)
    words = vocab_start + torch.arange(z.shape[1], device=z.device)
    target = torch.where(words == labels[:, None], z, 0.0).sum(-1)
    maximum, argmax = z.detach().max(-1)
    return HeadStatistics(z.logsumexp(-1), target, (z.softmax(-1) * z).sum(-1), maximum, argmax + vocab_start)


@jit
def own_word(label, first_word, num_words):
    """The labels as words of a shard, in 32 bits, -1 outside."""
    own = label - first_word
    return tl.where((own >= 0) & (own < num_words), own, -1).to(tl.int32)


# 128 x 256 tiles of z with BLOCK_K = 64, 8 warps and 3 stages fill an sm_90 (two warpgroups, 128 registers a thread of
# accumulator, 144 KiB of shared memory); sm_80 takes 128 x 128 x 32. GROUP = 16: a wave of 132 programs then reads as many rows as
# words. SLICE = 4096 words are 16 tiles to a program, and enough programs for even waves.
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


# Tiles as for the forward kernel. There is one tile to a program: the products of a chunk make waves enough.
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


def torch_forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_start: int, temperature: float, softcap: float | None, nll_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`launch_forward` returns, in plain torch and any float dtype; with nll_only unlabelled rows cost nothing."""
    T, V, wide = hidden.shape[0], weight.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    rows = _labelled(labels) if nll_only else None
    hidden, labels = _select(rows, hidden, labels)
    own, inside = _own_words(labels, vocab_start, V)
    words = weight.to(hidden.dtype)
    lse, target = (hidden.new_empty(labels.shape, dtype=wide) for _ in range(2))
    mean, maximum = (hidden.new_empty(0 if nll_only else T, dtype=wide) for _ in range(2))
    argmax = labels.new_empty(mean.shape, dtype=torch.int64)
    for piece in pieces(labels.shape[0], V):
        z = head_logits(hidden[piece], words, temperature, softcap)
        target[piece] = z.gather(1, own[piece, None]).squeeze(1)
        best, word = z.max(-1)
        logprob = z.log_softmax(-1)  # half the time of logsumexp on a CPU
        lse[piece] = best - logprob.gather(1, word[:, None]).squeeze(1)
        if not nll_only:
            maximum[piece], argmax[piece] = best, word
            p = logprob.exp_()
            mean[piece] = z.masked_fill_(p == 0, 0.0).mul_(p).sum(-1)
    target.masked_fill_(~inside, 0.0)
    if rows is not None:
        lse = lse.new_full((T,), -torch.inf).index_copy_(0, rows, lse)
        target = target.new_zeros(T).index_copy_(0, rows, target)
    return lse, target, mean, maximum, argmax.add_(vocab_start)


def torch_backward(
    g_lse: Tensor, g_target: Tensor, g_mean: Tensor | None, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, mean: Tensor,
    vocab_start: int, temperature: float, softcap: float | None, nll_only: bool, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What :func:`launch_backward` returns, in plain torch and any float dtype."""
    T, V = hidden.shape[0], weight.shape[0]
    rows = _labelled(labels) if nll_only else None
    hidden, labels, g_lse, g_target = _select(rows, hidden, labels, g_lse, g_target)
    own, inside = _own_words(labels, vocab_start, V)
    g_target = g_target.masked_fill(~inside, 0.0)

    def gradient(piece: slice, z: Tensor) -> Tensor:
        p = z.softmax(-1)
        if g_mean is None:
            g = p.mul_(g_lse[piece, None])
        else:
            g = p * (g_lse[piece, None] + g_mean[piece, None] * (1.0 + (z - mean[piece, None])))
            g.masked_fill_(p == 0, 0.0)
        return g.scatter_add_(1, own[piece, None], g_target[piece, None])

    dhidden, dweight = backward_by_rows(gradient, hidden, weight, temperature, softcap, need_hidden, need_weight)
    if rows is not None and need_hidden:
        dhidden = dhidden.new_zeros(T, dhidden.shape[1]).index_copy_(0, rows, dhidden)
    return dhidden, dweight


def _labelled(labels: Tensor) -> Tensor | None:
    """The rows that have a label; None where all have. Waits for a GPU, so only for dtypes that the kernels do not take."""
    rows = (labels != IGNORE).nonzero().squeeze(1)
    return None if rows.shape == labels.shape else rows


def _select(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if rows is None else tuple(x.index_select(0, rows) for x in tensors)


def _own_words(labels: Tensor, vocab_start: int, words: int) -> tuple[Tensor, Tensor]:
    """The labels as indices of the shard, 0 where they lie outside, and whether they lie inside."""
    own = labels.to(torch.int64) - vocab_start
    inside = (own >= 0) & (own < words)
    return own.masked_fill_(~inside, 0), inside


def _compute(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_start: int, temperature: float, softcap: float | None,
    nll_only: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The statistics; with nll_only the last three are of no rows, and lse is -inf where a row without a label was left out."""
    # What the products round to is decided here, not by the autocast of the caller.
    with torch.autocast(hidden.device.type, enabled=False):
        if runs_kernel(implementation, hidden):
            words = as_rows(weight.to(hidden.dtype))
            return launch_forward(as_rows(hidden), words, labels.contiguous(), vocab_start, temperature, softcap, nll_only)
        return torch_forward(hidden, weight, labels, vocab_start, temperature, softcap, nll_only)


linear_statistics_operator = torch.library.custom_op("smalt::linear_statistics", mutates_args=())(_compute)


@linear_statistics_operator.register_fake
def _(hidden, weight, labels, vocab_start, temperature, softcap, nll_only, implementation):
    wide, T = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    rest = 0 if nll_only else T
    lse, target, mean, maximum = (hidden.new_empty(n, dtype=wide) for n in (T, T, rest, rest))
    return lse, target, mean, maximum, labels.new_empty(rest, dtype=torch.int64)


def _gradient(
    g_lse: Tensor, g_target: Tensor, g_mean: Tensor | None, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, mean: Tensor,
    vocab_start: int, temperature: float, softcap: float | None, nll_only: bool, need_hidden: bool, need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (vocab_start, temperature, softcap, nll_only, need_hidden, need_weight)
    with torch.autocast(hidden.device.type, enabled=False):
        if runs_kernel(implementation, hidden):
            return launch_backward(g_lse, g_target, g_mean, as_rows(hidden), as_rows(weight), labels.contiguous(), lse, mean, *options)
        return torch_backward(g_lse, g_target, g_mean, hidden, weight, labels, lse, mean, *options)


_linear_statistics_backward = torch.library.custom_op("smalt::linear_statistics_backward", mutates_args=())(_gradient)


@_linear_statistics_backward.register_fake
def _(g_lse, g_target, g_mean, hidden, weight, labels, lse, mean, vocab_start, temperature, softcap, nll_only,
      need_hidden, need_weight, implementation):  # fmt: skip
    (T, D), V = hidden.shape, weight.shape[0]
    return hidden.new_empty(T if need_hidden else 0, D), weight.new_empty(V if need_weight else 0, D)


_differentiate = without_dispatcher(_linear_statistics_backward, _gradient)


def _setup(ctx, inputs, output):
    hidden, weight, labels, *ctx.options, ctx.implementation = inputs
    lse, _, mean, maximum, argmax = output
    ctx.mark_non_differentiable(maximum, argmax)
    ctx.set_materialize_grads(False)  # None tells the kernel that the mean has no part in the loss
    ctx.save_for_backward(hidden, weight, labels, lse, mean)


def _backward(ctx, g_lse, g_target, g_mean, _maximum, _argmax):
    hidden, weight, labels, lse, mean = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    g_mean = None if mean.numel() == 0 else g_mean
    zeros = torch.zeros_like(lse) if g_lse is None or g_target is None else lse
    g_lse, g_target = (zeros if g is None else g for g in (g_lse, g_target))
    dhidden, dweight = _differentiate(
        g_lse, g_target, g_mean, hidden, weight, labels, lse, mean, *ctx.options, need_hidden, need_weight, ctx.implementation
    )
    return dhidden if need_hidden else None, dweight if need_weight else None, *(None,) * 6


linear_statistics_operator.register_autograd(_backward, setup_context=_setup)
statistics = differentiable(linear_statistics_operator, _compute, _setup, _backward)
