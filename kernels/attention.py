"""Interval attention: query row t attends to the keys ``kv_start[t] <= k < kv_end[t]``, and to no other.

    z[t, h, k] = scale * q[t, h] . k[k, h // G],   capped: z = softcap * tanh(z / softcap)
    lse[t, h]  = log sum_k exp(z[t, h, k]),        k in [kv_start[t], kv_end[t])
    out[t, h]  = sum_k exp(z[t, h, k] - lse[t, h]) v[k, h // G]

Packed documents, causality, sliding windows, bidirectional image spans and the tiles of a vision tower are all such
intervals. Both bounds rise with t, so a block of rows sees one contiguous run of keys, and a block of keys is seen by one
contiguous run of rows. Softmax attention: Vaswani et al. 2017, equation 1; grouped queries: Ainslie et al. 2023 (arXiv
2305.13245); the online softmax: Milakov & Gimelshein 2018 (arXiv 1805.02867); blocks and recomputation: Dao 2023 (arXiv
2307.08691). With P = exp(z - lse), dP = dout v^T and delta = sum_d dout out - dlse, the gradients are

    dz = P (dP - delta),   dq = scale dz k,   dk = scale dz^T q,   dv = P^T dout,   dz capped: times 1 - (z / softcap)^2

A program owns its rows of dq, or its keys of dk and dv: nothing is added by two programs, and results have the same bits every time.
Keys are taken in blocks that count from the first key of a document, so a document's result has the same bits wherever it lies in
a pack and whatever lies beside it, as long as that is finite: a row takes 0 times the values of the other documents of its tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .attention_blocks import BlockPlan, attention_blocks, block_plan
from .attention_kernels import MAX_HEAD_DIM, launch_backward, launch_forward
from .checks import check_scales
from .dispatch import current_backend, is_abstract, runs_kernel, without_autocast


class Intervals(NamedTuple):
    """The bounds of a pack seen from both sides: int32 [3, T] and int32 [3, S].

    rows: of each row its first key, the end of its keys, and the first key of its document; keys: of each key the first row that
    sees it, the end of those rows, and the first row of its document.
    """

    rows: Tensor
    keys: Tensor


class AttentionPlan(NamedTuple):
    """What :func:`attention_plan` makes of the bounds of a pack, for all its layers: for kernels, and for plain torch."""

    intervals: Intervals | None
    blocks: BlockPlan | None


@overload
def attention(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, kv_start: Tensor, kv_end: Tensor,
    scale: float | None = None, plan: AttentionPlan | None = None, softcap: float | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, kv_start: Tensor, kv_end: Tensor,
    scale: float | None = None, plan: AttentionPlan | None = None, softcap: float | None = None, *, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of T query rows over one interval each of S keys; differentiable in q, k and v.

    q_THD: [T, H, D]; k_SKD, v_SKD: [S, K, D] with H a multiple of K, of any strides; kv_start, kv_end: integer [T], both
    non-decreasing, with ``0 <= kv_start`` and ``kv_end <= S``. Returns [T, H, D] in q's dtype; a row with an empty interval is
    zero. ``scale > 0`` defaults to ``D ** -0.5``; ``softcap`` bounds the scores; ``return_lse``: also the log-sum-exp of each row's
    scores, [T, H] in at least fp32, -inf for an empty row, differentiable as well. ``plan``: what :func:`attention_plan` made of these
    bounds, where several layers share them. Rows and keys need not be those of one sequence: a shard's rows over gathered keys,
    or over a chunk of keys with the bounds clamped to it, give what :func:`merge_attention` puts together.
    Head dims above 256 run in plain torch. Raises ValueError when shapes, dtypes or plan do not fit, for a scale or softcap that is
    not positive, and, where plain torch makes the plan, for bounds that fall or leave the keys.
    """
    _check(q_THD, k_SKD, v_SKD, kv_start, kv_end, scale, softcap)
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    implementation = current_backend(q_THD)
    if implementation == "reference":
        out, lse = attention_reference(q_THD, k_SKD, v_SKD, kv_start, kv_end, scale, softcap)
    elif implementation == "torch" and not is_abstract(q_THD):
        blocks = plan.blocks if plan and plan.blocks else block_plan(kv_start, kv_end, len(k_SKD))
        _check_plan(blocks.num_rows, blocks.num_keys, q_THD, k_SKD)
        out, lse = attention_blocks(q_THD, k_SKD, v_SKD, blocks, scale, softcap, return_lse)
    else:
        rows, keys = plan.intervals if plan and plan.intervals else intervals(kv_start, kv_end, len(k_SKD))
        _check_plan(rows.shape[1], keys.shape[1], q_THD, k_SKD)
        out, lse_HT = _attention(q_THD, k_SKD, v_SKD, rows, keys, scale, softcap or 0.0, implementation)
        lse = lse_HT.T
    return (out, lse) if return_lse else out


def attention_plan(kv_start: Tensor, kv_end: Tensor, num_keys: int | None = None) -> AttentionPlan:
    """What the implementation in force needs to know of a pack's bounds, made once for all layers. On a GPU without a host sync.

    ``num_keys``: as many as rows, when not given.
    """
    implementation = current_backend(kv_start.new_empty(0, dtype=torch.float32))
    num_keys = len(kv_start) if num_keys is None else num_keys
    if implementation == "reference":
        return AttentionPlan(None, None)
    if implementation == "torch" and not is_abstract(kv_start):
        return AttentionPlan(None, block_plan(kv_start, kv_end, num_keys))
    return AttentionPlan(intervals(kv_start, kv_end, num_keys), None)


def intervals(kv_start: Tensor, kv_end: Tensor, num_keys: int) -> Intervals:
    """Turn the interval of keys of each row into the interval of rows of each key, and find where documents begin."""
    # Wrong bounds are not looked for on a GPU, but they read no foreign memory.
    start, end = (bound.int().clamp(0, num_keys).contiguous() for bound in (kv_start, kv_end))
    key = torch.arange(num_keys, dtype=torch.int32, device=start.device)
    # Row t sees key k if start[t] <= k < end[t], and both rise: the rows that see k are those between two counts.
    first = torch.searchsorted(end, key, right=True, out_int32=True)
    stop = torch.searchsorted(start, key, right=True, out_int32=True)
    return Intervals(_with_origin(start, end), _with_origin(first, stop))


def _with_origin(start: Tensor, end: Tensor) -> Tensor:
    # A document begins where nothing is seen that is seen before it; its origin holds until the next one begins.
    new = torch.cat([start.new_ones(1, dtype=torch.bool), start[1:] >= end[:-1]]) if len(start) else start.bool()
    return torch.stack([start, end, torch.where(new, start, 0).cummax(0).values]) if len(start) else start.new_empty(3, 0)


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys, each ``(out, lse)``, as attention over all of them; differentiable.

    Rows that see nothing of a set have lse -inf there; rows that see nothing at all stay zero. Raises ValueError for no sets.
    """
    if not parts:
        raise ValueError("merge_attention: there is nothing to merge; expected a list of one or more (out, lse)")
    lse = torch.stack([lse for _, lse in parts])
    total = lse.detach().amax(0)
    shifted = (lse - torch.where(total.isfinite(), total, 0.0)).exp()
    norm = shifted.sum(0)
    weights = shifted / torch.where(norm > 0, norm, 1.0)
    out = sum((weight[..., None] * out for weight, (out, _) in zip(weights, parts, strict=True)), start=torch.zeros(()).to(lse))
    return out.to(parts[0][0].dtype), torch.where(norm > 0, torch.where(norm > 0, norm, 1.0).log() + total, float("-inf"))


def attention_reference(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, kv_start: Tensor, kv_end: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, with the whole T x S score matrix in memory: out and lse. Shapes as in :func:`attention`."""
    groups = q_THD.shape[1] // k_SKD.shape[1]
    k, v = k_SKD.repeat_interleave(groups, 1), v_SKD.repeat_interleave(groups, 1)
    key = torch.arange(k.shape[0], device=k.device)
    visible = (key >= kv_start[:, None]) & (key < kv_end[:, None])
    with without_autocast(q_THD):
        scores = torch.einsum("thd,shd->hts", q_THD, k) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        # A row that sees nothing is 0 / 0: define it as 0, in the gradient too.
        empty = ~visible.any(-1)[:, None]
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        lse = scores.to(wide).masked_fill(~(visible | empty), float("-inf")).logsumexp(-1)
        weights = torch.where(visible, (scores.to(wide) - lse[..., None]).exp(), 0.0).to(q_THD.dtype)
        return torch.einsum("hts,shd->thd", weights, v), lse.masked_fill(empty[:, 0], float("-inf")).T


@torch.library.custom_op("smalt::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, scale: float, softcap: float, implementation: str
) -> tuple[Tensor, Tensor]:
    if runs_kernel(implementation, q, MAX_HEAD_DIM):
        return launch_forward(q, k, v, rows, scale, softcap)
    out, lse = attention_blocks(q, k, v, block_plan(rows[0], rows[1], len(k)), scale, softcap or None, True)
    return out.contiguous(), lse.T.contiguous()


@_attention.register_fake
def _(q, k, v, rows, keys, scale, softcap, implementation):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("smalt::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    scale: float, softcap: float, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if runs_kernel(implementation, q, MAX_HEAD_DIM):
        return launch_backward(q, k, v, rows, keys, out, lse, dout, dlse, scale, softcap)
    # Inside an operator autograd records nothing; vjp does.
    plan = block_plan(rows[0], rows[1], len(k))

    def again(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_blocks(q, k, v, plan, scale, softcap or None, True)

    pullback: Callable[..., Any] = torch.func.vjp(again, q, k, v)[1]
    dq, dk, dv = pullback((dout, dlse.T))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attention_backward.register_fake
def _(q, k, v, rows, keys, out, lse, dout, dlse, scale, softcap, implementation):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, rows, keys, ctx.scale, ctx.softcap, ctx.implementation = inputs
    ctx.save_for_backward(q, k, v, rows, keys, *output)


def _backward(ctx, dout, dlse):
    q, k, v, rows, keys, out, lse = ctx.saved_tensors
    grads = _attention_backward(q, k, v, rows, keys, out, lse, dout, dlse, ctx.scale, ctx.softcap, ctx.implementation)
    return *grads, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)


def _check(q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor, kv_end: Tensor, scale: float | None, softcap: float | None) -> None:
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; expected q [T, H, D] and "
            "k, v [S, K, D] with H a multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; give all three one dtype")
    if kv_start.shape != q.shape[:1] or kv_end.shape != q.shape[:1]:
        raise ValueError(f"attention: kv_start {tuple(kv_start.shape)} and kv_end {tuple(kv_end.shape)} must be [{q.shape[0]}]")
    check_scales("attention", scale=scale, softcap=softcap)


def _check_plan(num_rows: int, num_keys: int, q: Tensor, k: Tensor) -> None:
    if (num_rows, num_keys) != (len(q), len(k)):
        raise ValueError(
            f"attention: the plan is of {num_rows} rows and {num_keys} keys, q has {len(q)} rows and k {len(k)}; make it by "
            "attention_plan(kv_start, kv_end, num_keys) of these bounds"
        )
