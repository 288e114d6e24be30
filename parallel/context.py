"""Context parallel: the rows of a pack shared over ranks, for attention whose keys are intervals of the whole pack.

A pack is cut into equal chunks of rows. Every rank takes as many, chosen so that the work of the ranks is even, and keeps them in
pack order; intervals stay in coordinates of the whole pack. Of keys that are any part of the pack, in order, a row's interval is an
interval again: its bounds are the numbers of those keys that stand before the old bounds. So packed documents and image spans may
cross the borders of chunks anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from smalt.kernels import AttentionPlan, attention, attention_plan, merge_attention
from smalt.model.cost import deal_chunks
from smalt.model.language import Rows

from .compat import all_to_all, finish, launch_all_gather, launch_reduce_scatter


def deal_rows(kv_start: np.ndarray, kv_end: np.ndarray, num_ranks: int, chunks: int) -> np.ndarray:
    """Rows of the pack that each rank holds, int64 [num_ranks, T / num_ranks], each in pack order: ``chunks`` chunks a rank.

    chunks = 1 gives each rank the rows that follow those of the rank before.
    """
    pairs = (kv_end - kv_start).astype(np.int64).reshape(num_ranks * chunks, -1)
    owners = deal_chunks(pairs.sum(1), num_ranks) if chunks > 1 else np.arange(num_ranks)[:, None]
    rows = owners[:, :, None] * pairs.shape[1] + np.arange(pairs.shape[1])
    return rows.reshape(num_ranks, -1)


@dataclass
class Round:
    """One exchange of keys: the chunk with the same number of every rank, put in pack order.

    order: int64 [keys], pack order of what is gathered, None where it is in order; kv_start, kv_end: int32 [T], of this rank's rows
    over these keys.
    """

    order: Tensor | None
    kv_start: Tensor
    kv_end: Tensor
    plan: AttentionPlan


class _Leaving(torch.autograd.Function):
    """Rows in equal chunks, to be gathered. Backward waits for their gradients, which :class:`_Arriving` launched."""

    @staticmethod
    def forward(ctx, x: Tensor, num: int) -> tuple[Tensor, ...]:
        return x.chunk(num)

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[override]
        return torch.cat([finish(gradient) for gradient in gradients]), None


class _Arriving(torch.autograd.Function):
    """A chunk of all ranks, whose all-gather was launched before. Backward launches the way home of its gradient, and goes on."""

    @staticmethod
    def forward(ctx, chunk: Tensor, launched: Tensor, group_name: str, size: int) -> Tensor:
        ctx.group = group_name, size
        return finish(launched)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return launch_reduce_scatter(gradient, *ctx.group), None, None, None


@dataclass
class GatheredRows(Rows):
    """Rows whose keys and values come from all ranks of cp, a chunk of each at a time, the next on its way while one computes.

    Of the nodes that are ready autograd runs the newest first: backward is the mirror of forward, the gradient of a chunk is on its
    way home while that of the chunk before is computed.
    """

    rounds: list[Round]
    group: ProcessGroup

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        group = self.group.group_name, self.group.size()
        chunks = _Leaving.apply(torch.stack([k_TKD, v_TKD], 1), len(self.rounds))
        coming = launch_all_gather(chunks[0].detach(), *group)
        parts = []
        for i, step in enumerate(self.rounds):
            kv = _Arriving.apply(chunks[i], coming, *group)
            if i + 1 < len(chunks):
                coming = launch_all_gather(chunks[i + 1].detach(), *group)
            kv = kv if step.order is None else kv.index_select(0, step.order)
            k, v = kv.unbind(1)
            parts.append(attention(q_THD, k, v, step.kv_start, step.kv_end, plan=step.plan, return_lse=True))
        return merge_attention(parts)[0]


@dataclass
class ScatteredRows(Rows):
    """Rows that change places with heads: every rank attends with its share of the heads over the whole pack (Ulysses, Jacobs et al.
    2023, arXiv 2309.14509). kv_start, kv_end and plan are those of the whole pack; key and value heads are repeated where they are
    fewer than ranks."""

    group: ProcessGroup

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        size = self.group.size()
        k, v = (x.repeat_interleave(max(1, size // x.shape[1]), 1) for x in (k_TKD, v_TKD))
        num_heads, num_kv = q_THD.shape[1] // size, k.shape[1] // size
        # [T, size * heads, D] to [size, T, heads, D]: what goes to one rank lies together.
        apart = [x.unflatten(1, (size, -1)).transpose(0, 1) for x in (q_THD, k, v)]
        q, k, v = self._exchange(torch.cat(apart, 2)).flatten(0, 1).split((num_heads, num_kv, num_kv), 1)
        out = attention(q, k, v, self.kv_start, self.kv_end, plan=self.plan)
        return self._exchange(out.unflatten(0, (size, -1))).transpose(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        """Slice r of x [size, ...] to rank r; back comes a slice of each."""
        return all_to_all(x, [1] * len(x), [1] * len(x), self.group)


def plan_rounds(
    kv_start: np.ndarray, kv_end: np.ndarray, rows: np.ndarray, rank: int, chunks: int, device: torch.device
) -> list[Round]:
    """The exchanges of "gather" for the rows of one rank. kv_start, kv_end: int32 [T], whole pack; rows: of :func:`deal_rows`."""
    mine = rows[rank]
    rounds = []
    for keys in np.split(rows, chunks, axis=1):
        gathered = keys.flatten()
        order = np.argsort(gathered, kind="stable")
        keys = gathered[order]
        bounds = (torch.from_numpy(np.searchsorted(keys, b[mine]).astype(np.int32)).to(device) for b in (kv_start, kv_end))
        start, end = bounds
        in_order = bool((order == np.arange(len(order))).all())
        plan = attention_plan(start, end, len(keys))
        rounds.append(Round(None if in_order else torch.from_numpy(order).to(device), start, end, plan))
    return rounds
