"""Interval attention: query row t attends to the keys ``kv_start[t] <= k < kv_end[t]``, and to no other.

    out[t, h] = sum_k softmax_k(scale * q[t, h] . k[k, h // G]) v[k, h // G],   k in [kv_start[t], kv_end[t])

Packed documents, causality, sliding windows, bidirectional image spans and the tiles of a vision tower are all such
intervals. Both bounds rise with t, so a block of rows sees one contiguous run of keys. Softmax attention: Vaswani et al.
2017, equation 1; grouped queries: Ainslie et al. 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import current_backend

# A document of more rows is cut into blocks, so that its first rows are not multiplied with its last keys; into few, since a
# key is gathered once for every block that sees it.
BLOCK_ROWS, MAX_BLOCKS = 32, 4


def attention(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Attention of T query rows over one interval each of S keys; differentiable in q, k and v.

    q_THD: [T, H, D]; k_SKD, v_SKD: [S, K, D] with H a multiple of K; kv_start, kv_end: integer [T], both non-decreasing,
    with ``0 <= kv_start`` and ``kv_end <= S``. Returns [T, H, D] in q's dtype; a row with an empty interval is zero.
    ``scale`` defaults to ``D ** -0.5``. ``plan``: what :func:`attention_plan` made of these bounds, where several layers share
    them. Raises ValueError when the shapes do not fit.
    """
    _check_shapes(q_THD, k_SKD, v_SKD, kv_start, kv_end)
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    if current_backend() == "reference":
        return attention_reference(q_THD, k_SKD, v_SKD, kv_start, kv_end, scale)
    return _attention_blocks(q_THD, k_SKD, v_SKD, plan or attention_plan(kv_start, kv_end), scale)


def attention_reference(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, kv_start: Tensor, kv_end: Tensor, scale: float) -> Tensor:
    """The definition, with the whole T x S score matrix in memory. Shapes as in :func:`attention`."""
    groups = q_THD.shape[1] // k_SKD.shape[1]
    k, v = k_SKD.repeat_interleave(groups, 1), v_SKD.repeat_interleave(groups, 1)
    key = torch.arange(k.shape[0], device=k.device)
    visible = (key >= kv_start[:, None]) & (key < kv_end[:, None])
    scores = torch.einsum("thd,shd->hts", q_THD, k) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    # A row that sees nothing is 0 / 0: define it as 0, in the gradient too.
    weights = torch.where(visible, weights, 0.0)
    return torch.einsum("hts,shd->thd", weights, v)


@dataclass(frozen=True)
class AttentionPlan:
    """The rows of a pack as blocks, and these as groups of like size: n blocks, each padded to R rows and W keys.

    shapes: (n, R, W) of each group; rows: int64 [sum n * R] and keys: int64 [sum n * W], indices into q and into k and v, a
    block's last one repeated where it has fewer; visible: bool [n, 1, R, W] of each group, None where all is; place: int64 [T],
    where in ``rows`` each row of q stands, or, for an empty one, the length of ``rows``. Of the three indices, one that counts
    0, 1, 2 and so on is None: the tiles of a vision tower lie as they are needed.
    """

    shapes: list[tuple[int, int, int]]
    rows: Tensor | None
    keys: Tensor | None
    visible: list[Tensor | None]
    place: Tensor | None


def attention_plan(kv_start: Tensor, kv_end: Tensor) -> AttentionPlan:
    """Cut the rows into blocks that lie in one document each, and group the blocks whose keys fall between two powers of two."""
    start, end = kv_start.numpy(force=True), kv_end.numpy(force=True)
    if (start >= end).all():  # one block whose output no row takes: gradients are then zero, not missing
        return AttentionPlan([(1, 1, 1)], None, None, [None], torch.ones_like(kv_start, dtype=torch.int64))
    blocks = _cut_blocks(start, end)
    size = np.ceil(np.log2(blocks[:, 3] - blocks[:, 2]))
    shapes, all_rows, all_keys, visible, place, taken = [], [], [], [], np.full(len(start), -1), 0
    for s in np.unique(size):
        row, row_end, key, key_end = blocks[size == s].T[:, :, None]
        rows, keys = row + np.arange((row_end - row).max()), key + np.arange((key_end - key).max())
        place[rows[rows < row_end]] = taken + np.flatnonzero(rows < row_end)
        taken += rows.size
        rows = np.minimum(rows, row_end - 1)
        seen = (keys[:, None] >= start[rows][..., None]) & (keys[:, None] < end[rows][..., None])
        shapes.append(seen.shape)
        all_rows.append(rows.flatten())
        all_keys.append(np.minimum(keys, key_end - 1).flatten())
        visible.append(None if seen.all() else torch.from_numpy(seen[:, None]).to(kv_start.device))
    place[start >= end] = taken

    def index(x: np.ndarray) -> Tensor | None:
        return None if (x == np.arange(len(x))).all() else torch.from_numpy(x).to(kv_start.device)

    return AttentionPlan(shapes, index(np.concatenate(all_rows)), index(np.concatenate(all_keys)), visible, index(place))


def _cut_blocks(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """int64 [num_blocks, 4]: first row and end of each block, and first key and end of what its rows see."""
    # A document starts where a row sees no key that the row before it sees; an empty row belongs to none.
    new = start >= np.append(-1, end[:-1])
    firsts, stops = np.flatnonzero(new & (start < end)), np.append(np.flatnonzero(new | (start >= end)), len(start))
    blocks = []
    for low, high in zip(firsts.tolist(), stops[np.searchsorted(stops, firsts, "right")].tolist(), strict=True):
        alike = start[low] == start[high - 1] and end[low] == end[high - 1]
        num = 1 if alike else min(MAX_BLOCKS, -(-(high - low) // BLOCK_ROWS))
        cuts = [low + (high - low) * i // num for i in range(num + 1)]
        blocks += [(a, b, start[a], end[b - 1]) for a, b in pairwise(cuts)]
    return np.array(blocks, np.int64)


def _attention_blocks(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Each block of rows against the keys that any of its rows sees, the blocks of a group as one batch."""
    # On a CPU torch's attention is several times slower in bf16 than in fp32, and autocast would bring it back to bf16.
    wide = torch.promote_types(q_THD.dtype, torch.float32) if q_THD.device.type == "cpu" else q_THD.dtype
    num_rows, num_keys = [n * rows for n, rows, _ in plan.shapes], [n * keys for n, _, keys in plan.shapes]
    outputs = []
    with torch.autocast(q_THD.device.type, enabled=False):
        q_rows = _take(q_THD.to(wide), plan.rows, sum(num_rows)).split(num_rows)
        k_rows, v_rows = (_take(x.to(wide), plan.keys, sum(num_keys)).split(num_keys) for x in (k_SKD, v_SKD))
        for (n, *_), q, k, v, visible in zip(plan.shapes, q_rows, k_rows, v_rows, plan.visible, strict=True):
            q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in (q, k, v))
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=gqa)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
    nothing = q_THD.new_zeros(1, *q_THD.shape[1:], dtype=wide)
    return _take(torch.cat([*outputs, nothing]), plan.place, len(q_THD)).to(q_THD.dtype)


def _take(x: Tensor, index: Tensor | None, length: int) -> Tensor:
    """The rows of an index, or the first ones."""
    return x[:length] if index is None else x.index_select(0, index)


def decode_attention(q_BHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, lengths: Tensor, scale: float | None = None) -> Tensor:
    """One query row a sequence over that sequence's cached keys: the step of generation. Not differentiable by intent.

    q_BHD: [B, H, D]; k_BLKD, v_BLKD: [B, L, K, D]; lengths: integer [B], row b sees keys 0 <= k < lengths[b], at least one.
    Returns [B, H, D].
    """
    B, H, D = q_BHD.shape
    K = k_BLKD.shape[2]
    scale = D**-0.5 if scale is None else scale
    visible = torch.arange(k_BLKD.shape[1], device=lengths.device) < lengths[:, None]
    scores = torch.einsum("bkgd,blkd->bkgl", q_BHD.view(B, K, H // K, D), k_BLKD) * scale
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bkgl,blkd->bkgd", weights, v_BLKD).reshape(B, H, D)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor, kv_end: Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; expected q [T, H, D] and "
            "k, v [S, K, D] with H a multiple of K"
        )
    if kv_start.shape != q.shape[:1] or kv_end.shape != q.shape[:1]:
        raise ValueError(f"attention: kv_start {tuple(kv_start.shape)} and kv_end {tuple(kv_end.shape)} must be [{q.shape[0]}]")
