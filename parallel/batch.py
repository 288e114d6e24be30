"""A rank's share of a pack: its rows, its tiles, and where the embeddings of the tiles go.

All ranks that share a pack make the same plan from the whole of it, so that nothing about sizes is ever communicated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smalt.model import PackedBatch

from .context import Round, deal_rows, plan_rounds
from .mesh import World


@dataclass(frozen=True)
class TileExchange:
    """The one all-to-all between the ranks of a cp x tp group that brings embeddings of tiles to the rows they replace.

    order: int64, which of this rank's embeddings are used or sent, by destination, None for all in their order; send, receive: how
    many to and from each rank, empty where none is exchanged; rows: int64, which of this rank's hidden rows they replace, in order.
    """

    order: Tensor | None
    send: list[int]
    receive: list[int]
    rows: Tensor


@dataclass(frozen=True)
class PackShard:
    """What one rank computes of a pack. ``rows`` are those of its rank of cp, [T / cp] with T tokens in the pack.

    tokens, positions, labels, loss_weight: of these rows; documents: int64, number in the pack of the document of each of these rows,
    of those that no document fills any; kv_start, kv_end: of the whole pack; rounds: how keys come, for cp with
    "gather"; tiles: those that go through this rank's vision tower; exchange: where what it makes of them goes.
    """

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    kv_start: Tensor
    kv_end: Tensor
    labels: Tensor
    loss_weight: Tensor
    rounds: list[Round]
    tiles: Tensor
    exchange: TileExchange


def shard_pack(batch: PackedBatch, tokens_per_tile: int, world: World) -> PackShard:
    """This rank's share. ``batch`` is the whole pack, on the CPU or on the rank's device."""
    parallel, place, device = world.parallel, world.coordinates, world.device
    kv_start, kv_end = batch.kv_start.cpu().numpy(), batch.kv_end.cpu().numpy()
    rows = deal_rows(kv_start, kv_end, parallel.cp, parallel.chunks_a_rank)
    gathers = parallel.cp > 1 and parallel.context == "gather"
    rounds = plan_rounds(kv_start, kv_end, rows, place["cp"], parallel.chunks_a_rank, device) if gathers else []
    mine = torch.from_numpy(rows[place["cp"]])

    def of_rows(x: Tensor) -> Tensor:
        return x[mine.to(x.device)].to(device)

    tiles, exchange = _share_tiles(batch, tokens_per_tile, rows, world)
    return PackShard(
        of_rows(batch.tokens), of_rows(batch.positions), of_rows((batch.positions == 0).cumsum(0) - 1), batch.kv_start.to(device),
        batch.kv_end.to(device), of_rows(batch.labels), of_rows(batch.loss_weight), rounds, tiles.to(device), exchange,
    )  # fmt: skip


def _share_tiles(batch: PackedBatch, tokens_per_tile: int, rows: np.ndarray, world: World) -> tuple[Tensor, TileExchange]:
    parallel, place = world.parallel, world.coordinates
    size, me = parallel.cp * parallel.tp, place["cp"] * parallel.tp + place["tp"]
    if size == 1:
        return batch.tiles, TileExchange(None, [], [], batch.image_index.to(world.device))
    # Between blocks the rows of a rank of cp are shared out over tp: hidden row -> (rank, index there).
    hidden = rows.reshape(size, -1)
    owner, index = np.empty(rows.size, np.int64), np.empty(rows.size, np.int64)
    owner[hidden], index[hidden] = np.arange(size)[:, None], np.arange(hidden.shape[1])
    image = batch.image_index.cpu().numpy()
    num_tiles = len(batch.tiles)
    border = np.arange(size + 1) * num_tiles // size  # of the tiles that each rank sees
    if parallel.tiles == "replicated":
        mine = np.flatnonzero(owner[image] == me)
        own = torch.from_numpy(mine)
        exchange = TileExchange(own.to(world.device), [], [], torch.from_numpy(index[image[mine]]).to(world.device))
        return batch.tiles, exchange
    seen_by = np.searchsorted(border, np.arange(num_tiles), side="right") - 1
    sender = np.repeat(seen_by, tokens_per_tile)
    counts = np.zeros((size, size), np.int64)  # [from, to]
    np.add.at(counts, (sender, owner[image]), 1)
    first = border[me] * tokens_per_tile
    sent = np.flatnonzero(sender == me)
    order = sent[np.argsort(owner[image[sent]], kind="stable")] - first
    arriving = np.flatnonzero(owner[image] == me)  # by sender, for tiles are dealt in order
    exchange = TileExchange(
        torch.from_numpy(order).to(world.device), counts[me].tolist(), counts[:, me].tolist(),
        torch.from_numpy(index[image[arriving]]).to(world.device),
    )  # fmt: skip
    return batch.tiles[int(border[me]) : int(border[me + 1])], exchange
