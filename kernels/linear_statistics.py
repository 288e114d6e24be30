"""What every loss on a vocabulary is made of, from hidden states and the weight of the head, without logits in memory.

Of one row and the words v of a vocabulary, or of a shard of it, with c = softcap (x in place of c tanh(x / c) without one):

    x[v] = hidden . weight[v],   z[v] = c tanh(x[v] / c) / temperature,   p = softmax(z)
    lse = log sum_v exp(z[v]),   target = z[label],   mean = sum_v p[v] z[v],   maximum = max_v z[v],   argmax

The negative log-likelihood is lse - target, the entropy lse - mean. A label outside the shard has target 0, so that shards merge
by :func:`merge_statistics`. The gradient, for upstream gradients g of lse, target and mean:

    dz[v] = p[v] (g_lse + g_mean (1 + z[v] - mean)) + [v = label] g_target
    dx[v] = dz[v] (1 - tanh(x[v] / c)^2) / temperature

A head without logits in memory: Wijmans et al. 2024 (arXiv 2411.09009). Online softmax: Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import current_backend, differentiable, runs_kernel, without_autocast, without_dispatcher
from .head import IGNORE, backward_by_rows, cast_as_autocast_does, check_head, check_labels, head_logits, pieces
from .launch import as_rows
from .linear_statistics_kernels import launch_backward, launch_forward


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
    vocabulary or ``IGNORE``. Raises ValueError when the shapes or the dtype of labels do not fit, temperature or softcap is not
    positive, or, on a CPU, a label is out of range.
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
    own = labels - vocab_start
    inside = (own >= 0) & (own < words)
    return own.masked_fill_(~inside, 0), inside


def _compute(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_start: int, temperature: float, softcap: float | None,
    nll_only: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The statistics; with nll_only the last three are of no rows, and lse is -inf where a row without a label was left out."""
    # What the products round to is decided here, not by the autocast of the caller.
    with without_autocast(hidden):
        if runs_kernel(implementation, hidden):
            words = as_rows(weight.to(hidden.dtype))
            return launch_forward(as_rows(hidden), words, labels.contiguous(), vocab_start, temperature, softcap, nll_only)
        return torch_forward(hidden, weight, labels, vocab_start, temperature, softcap, nll_only)


_linear_statistics = torch.library.custom_op("smalt::linear_statistics", mutates_args=())(_compute)


@_linear_statistics.register_fake
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
    with without_autocast(hidden):
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


_linear_statistics.register_autograd(_backward, setup_context=_setup)
statistics = differentiable(_linear_statistics, _compute, _setup, _backward)
