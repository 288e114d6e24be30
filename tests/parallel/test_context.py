"""Sharing a pack out: every row and every tile on one rank, keys that are the same keys, work that is even."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import attention, merge_attention
from smalt.model import Document, pack
from smalt.parallel import ParallelConfig, alone
from smalt.parallel.batch import shard_pack
from smalt.parallel.context import deal_rows, plan_rounds

CPU = torch.device("cpu")
TOKENS_PER_TILE = 2


@st.composite
def packs(draw, rows=48):
    """A pack of 48 tokens: text and image spans in documents of any length, perhaps a tail."""
    documents, left = [], draw(st.integers(0, rows))
    while left > 0:
        length = draw(st.integers(1, left))
        left -= length
        starts = sorted(draw(st.lists(st.integers(0, max(0, length - TOKENS_PER_TILE)), max_size=3, unique=True)))
        spans, at = [], 0
        for start in starts:
            start, stop = max(start, at), max(start, at) + TOKENS_PER_TILE * draw(st.integers(1, 3))
            if stop <= length:
                spans.append((start, stop))
                at = stop
        image = np.concatenate([np.arange(*span) for span in spans] or [np.zeros(0, np.int64)])
        tiles = np.random.default_rng(length).standard_normal((len(image) // TOKENS_PER_TILE, 3, 2, 2)).astype(np.float32)
        tokens = np.arange(length)
        targets = np.ones(length, bool)
        documents.append(Document(tokens, targets, image, tiles, np.array(spans, np.int64).reshape(-1, 2)))
    return pack(documents, rows, "bidirectional", 2)


def world_of(parallel, rank):
    sized = ParallelConfig(**parallel).sized(parallel.get("cp", 1) * parallel.get("tp", 1))
    return replace(alone(CPU), rank=rank, size=sized.cp * sized.tp, parallel=sized)


@given(packs(), st.sampled_from([(1, 1), (2, 1), (2, 4), (4, 3), (3, 2)]))
def test_every_row_is_on_one_rank_in_pack_order(batch, shape):
    ranks, chunks = shape
    rows = deal_rows(batch.kv_start.numpy(), batch.kv_end.numpy(), ranks, chunks)
    assert rows.shape == (ranks, 48 // ranks)
    assert sorted(rows.flatten()) == list(range(48))
    assert (np.diff(rows) > 0).all()


def test_work_is_even():
    # One causal document: the rank with the last rows would have 7 times the work of the one with the first.
    q = np.arange(4096)
    rows = deal_rows(np.zeros(4096, np.int64), q + 1, 4, 4)
    pairs = (q + 1)[rows].sum(1)
    assert pairs.max() / pairs.mean() < 1.001
    contiguous = (q + 1)[deal_rows(np.zeros(4096, np.int64), q + 1, 4, 1)].sum(1)
    assert contiguous.max() / contiguous.mean() > 1.7


@given(packs(), st.sampled_from([(2, 1), (2, 4), (4, 3), (3, 2)]), st.data())
def test_rounds_see_the_same_keys(batch, shape, data):
    ranks, chunks = shape
    rank = data.draw(st.integers(0, ranks - 1))
    kv_start, kv_end = batch.kv_start.numpy(), batch.kv_end.numpy()
    rows = deal_rows(kv_start, kv_end, ranks, chunks)
    seen = [[] for _ in rows[rank]]
    for number, step in enumerate(plan_rounds(kv_start, kv_end, rows, rank, chunks, CPU)):
        gathered = np.concatenate([np.split(r, chunks)[number] for r in rows])
        keys = gathered if step.order is None else gathered[step.order.numpy()]
        for row, (low, high) in enumerate(zip(step.kv_start.tolist(), step.kv_end.tolist(), strict=True)):
            seen[row] += keys[low:high].tolist()
    for row, t in zip(seen, rows[rank], strict=True):
        assert sorted(row) == list(range(kv_start[t], kv_end[t])) if kv_start[t] < 48 else row == []


@given(packs())
def test_rounds_merge_to_the_attention_of_one_process(batch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(48, 2, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    want = attention(q, k, v, batch.kv_start, batch.kv_end)
    kv_start, kv_end = batch.kv_start.numpy(), batch.kv_end.numpy()
    rows = deal_rows(kv_start, kv_end, 2, 4)
    for rank in range(2):
        parts = []
        for number, step in enumerate(plan_rounds(kv_start, kv_end, rows, rank, 4, CPU)):
            keys = torch.from_numpy(np.sort(np.concatenate([np.split(r, 4)[number] for r in rows])))
            parts.append(attention(q[rows[rank]], k[keys], v[keys], step.kv_start, step.kv_end, plan=step.plan, return_lse=True))
        torch.testing.assert_close(merge_attention(parts)[0], want[rows[rank]], rtol=1e-12, atol=1e-12)


@given(
    packs(), st.sampled_from([{"cp": 2, "context_chunks": 4}, {"cp": 2, "tp": 2, "context": "scatter"}, {"cp": 3, "tp": 2}, {"tp": 4}])
)
def test_every_tile_is_seen_once_and_lands_in_its_rows(batch, parallel):
    parallel = {"context_chunks": 2, **parallel}
    size = parallel.get("cp", 1) * parallel.get("tp", 1)
    worlds = [world_of(parallel, rank) for rank in range(size)]
    shards = [shard_pack(batch, TOKENS_PER_TILE, world) for world in worlds]
    assert torch.equal(torch.cat([s.tiles for s in shards]), batch.tiles)
    counts = [len(s.tiles) for s in shards]
    assert max(counts) - min(counts) <= 1
    # What a tower would make of a tile's tokens: their numbers in the pack.
    number, embedded = 0, []
    for shard in shards:
        rows = torch.arange(number, number + len(shard.tiles) * TOKENS_PER_TILE)
        embedded.append(rows[shard.exchange.order])
        number += len(rows)
    placed = {}
    for rank, (shard, world) in enumerate(zip(shards, worlds, strict=True)):
        sent = [embedded[r].split(shards[r].exchange.send)[rank] for r in range(size)]
        assert [len(x) for x in sent] == shard.exchange.receive
        rows = deal_rows(batch.kv_start.numpy(), batch.kv_end.numpy(), world.parallel.cp, world.parallel.chunks_a_rank)
        hidden = np.split(rows[world.coordinates["cp"]], world.parallel.tp)[world.coordinates["tp"]]
        for row, image_row in zip(shard.exchange.rows.tolist(), torch.cat(sent).tolist(), strict=True):
            placed[int(hidden[row])] = image_row
    assert placed == {int(row): i for i, row in enumerate(batch.image_index)}


@given(packs())
def test_replicated_tiles_land_in_the_same_rows(batch):
    for parallel in ({"cp": 2, "tp": 2}, {"tp": 3}):
        size = parallel.get("cp", 1) * parallel["tp"]
        both = []
        for tiles in ("shared", "replicated"):
            worlds = [world_of({**parallel, "tiles": tiles}, rank) for rank in range(size)]
            both.append([sorted(shard_pack(batch, TOKENS_PER_TILE, w).exchange.rows.tolist()) for w in worlds])
        assert both[0] == both[1]
