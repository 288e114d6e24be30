"""Interval attention in plain torch, without what no row sees: the rows of a pack as blocks that lie in one document each.

Where only the output is asked for, and no cap, torch's own attention does the blocks; else the formula of
:mod:`smalt.kernels.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import without_autocast

# A document of more rows is cut into blocks, so that its first rows are not multiplied with its last keys; into few, since a
# key is gathered once for every block that sees it.
BLOCK_ROWS, MAX_BLOCKS = 32, 4


@dataclass(frozen=True)
class BlockPlan:
    """The rows of a pack as blocks, and these as groups of like size: n blocks, each padded to R rows and W keys.

    shapes: (n, R, W) of each group; rows: int64 [sum n * R] and keys: int64 [sum n * W], indices into q and into k and v, a
    block's last one repeated where it has fewer; visible: bool [n, 1, R, W] of each group, None where all is; place: int64 [T],
    where in ``rows`` each row of q stands, or, for an empty one, the length of ``rows``. Of the three indices, one that counts
    0, 1, 2 and so on is None: the tiles of a vision tower lie as they are needed. num_rows, num_keys: T and S.
    """

    shapes: list[tuple[int, int, int]]
    rows: Tensor | None
    keys: Tensor | None
    visible: list[Tensor | None]
    place: Tensor | None
    num_rows: int
    num_keys: int


def block_plan(kv_start: Tensor, kv_end: Tensor, num_keys: int) -> BlockPlan:
    """Cut the rows into blocks that lie in one document each, and group the blocks whose keys fall between two powers of two.

    Raises ValueError for bounds that fall, or that leave the ``num_keys`` keys.
    """
    # By lists, which torch.func can look into.
    start, end = (np.array(bound.tolist(), np.int64) for bound in (kv_start, kv_end))
    _check_bounds(start, end, num_keys)
    size = len(start), num_keys
    if (start >= end).all():  # one block whose output no row takes: gradients are then zero, not missing
        return BlockPlan([(1, 1, 1)], None, None, [None], torch.ones_like(kv_start, dtype=torch.int64), *size)
    blocks = _cut_blocks(start, end)
    width = np.ceil(np.log2(blocks[:, 3] - blocks[:, 2]))
    shapes, all_rows, all_keys, visible, place, taken = [], [], [], [], np.full(len(start), -1), 0
    for w in np.unique(width):
        row, row_end, key, key_end = blocks[width == w].T[:, :, None]
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

    return BlockPlan(shapes, index(np.concatenate(all_rows)), index(np.concatenate(all_keys)), visible, index(place), *size)


def _check_bounds(start: np.ndarray, end: np.ndarray, num_keys: int) -> None:
    for name, bound in (("kv_start", start), ("kv_end", end)):
        falls = np.flatnonzero(np.diff(bound) < 0)
        if len(falls):
            t = int(falls[0]) + 1
            raise ValueError(f"attention: {name} falls from {bound[t - 1]} to {bound[t]} at row {t}; neither bound may fall")
    outside = np.flatnonzero((start < 0) | (end > num_keys))
    if len(outside):
        t = int(outside[0])
        raise ValueError(f"attention: row {t} sees the keys {start[t]} to {end[t]}, but there are {num_keys}")


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


def attention_blocks(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, plan: BlockPlan, scale: float, softcap: float | None, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """Each block of rows against the keys that any of its rows sees, the blocks of a group as one batch.

    Returns out [T, H, D] and lse [T, H], which holds nothing unless ``with_lse``.
    """
    # On a CPU torch's attention is several times slower in bf16 than in fp32, and autocast would bring it back to bf16.
    wide = torch.promote_types(q_THD.dtype, torch.float32) if q_THD.device.type == "cpu" else q_THD.dtype
    T, H = q_THD.shape[:2]
    # The plan of rows that see nothing takes one row and one key all the same.
    q_THD, k_SKD, v_SKD = (x if len(x) else F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (q_THD, k_SKD, v_SKD))
    num_rows, num_keys = [n * rows for n, rows, _ in plan.shapes], [n * keys for n, _, keys in plan.shapes]
    outputs, lses = [], []
    with without_autocast(q_THD):
        q_rows = _take(q_THD.to(wide), plan.rows, sum(num_rows)).split(num_rows)
        k_rows, v_rows = (_take(x.to(wide), plan.keys, sum(num_keys)).split(num_keys) for x in (k_SKD, v_SKD))
        for (n, *_), q, k, v, visible in zip(plan.shapes, q_rows, k_rows, v_rows, plan.visible, strict=True):
            q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in (q, k, v))
            if with_lse or softcap is not None:
                out, lse = _block(q, k, v, visible, scale, softcap)
                lses.append(lse.transpose(1, 2).flatten(0, 1))
            else:
                gqa = q.shape[1] != k.shape[1]
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=gqa)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
    nothing = q_THD.new_zeros(1, *q_THD.shape[1:], dtype=wide)
    out = _take(torch.cat([*outputs, nothing]), plan.place, T).to(q_THD.dtype)
    if not with_lse:
        return out, q_THD.new_empty(0)
    nothing = q_THD.new_full((1, H), float("-inf"), dtype=torch.promote_types(q_THD.dtype, torch.float32))
    return out, _take(torch.cat([*lses, nothing]), plan.place, T)


def _block(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """q [n, H, R, D] over k, v [n, K, W, D]: out [n, H, R, D] and lse [n, H, R]. A padding row sees what the row before it sees."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    return (scores - lse[..., None].to(scores.dtype)).exp() @ v, lse


def _take(x: Tensor, index: Tensor | None, length: int) -> Tensor:
    """The rows of an index, or the first ones."""
    return x[:length] if index is None else x.index_select(0, index)
