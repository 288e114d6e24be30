"""What a pack costs, in FLOPs of one training step; the one estimate of work in the house.

    cost(pack) = a tokens + b sum(kv_end - kv_start) + c tiles

A product of [m, k] and [k, n] is 2 m k n, and its backward pass twice that. Elementwise work is left out. Packer, context sharder
and pipeline splitter compare costs; none needs more than their ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import ModelConfig

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Workload:
    """What there is to do: rows of the decoder, pairs of a row and a key that it sees, tiles of the vision tower."""

    tokens: float
    pairs: float
    tiles: float


@dataclass(frozen=True)
class Cost:
    """FLOPs of forward and backward. token, pair: of one decoder block; head: of a token; tile: of the tower and the projector."""

    token: float
    pair: float
    head: float
    tile: float
    num_blocks: int

    def block(self, work: Workload) -> float:
        """Of one decoder block."""
        return self.token * work.tokens + self.pair * work.pairs

    def __call__(self, work: Workload) -> float:
        """Of the whole model."""
        return self.num_blocks * self.block(work) + self.head * work.tokens + self.tile * work.tiles


def model_cost(config: ModelConfig) -> Cost:
    """The coefficients of a model, counted from its shapes."""
    text, vision = config.language, config.vision
    token = text.width * text.head_dim * 2 * (text.num_heads + text.num_kv_heads) + 3 * text.width * text.ffn
    pair = 2 * text.num_heads * text.head_dim
    patches = vision.grid**2
    block = patches * (4 * vision.width**2 + 2 * vision.width * vision.ffn) + patches**2 * 2 * vision.width
    hidden = config.projector_width or text.width
    projector = vision.tokens_per_tile * hidden * (vision.width * vision.merge**2 + text.width)
    tile = patches * 3 * vision.patch**2 * vision.width + vision.num_layers * block + projector
    flops = 2 * FORWARD_AND_BACKWARD
    return Cost(flops * token, flops * pair, flops * text.width * text.vocabulary, flops * tile, text.num_layers)


def deal_chunks(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """Give every rank as many of the chunks, so that the largest sum of a rank is small; int64 [num_ranks, chunks a rank], sorted.

    Dearest first, each to the cheapest rank that still takes one (Graham 1969, longest processing time); the same on every
    process. Raises ValueError when the chunks do not divide.
    """
    if len(costs) % num_ranks:
        raise ValueError(f"{len(costs)} chunks do not divide over {num_ranks} ranks")
    room = len(costs) // num_ranks
    sums, dealt = np.zeros(num_ranks), [list[int]() for _ in range(num_ranks)]
    for chunk in np.argsort(-np.asarray(costs, np.float64), kind="stable"):
        rank = min((r for r in range(num_ranks) if len(dealt[r]) < room), key=lambda r: sums[r])
        dealt[rank].append(int(chunk))
        sums[rank] += costs[chunk]
    return np.sort(np.array(dealt, np.int64).reshape(num_ranks, room), axis=1)


def split_blocks(cost: Cost, work: Workload, num_parts: int) -> list[range]:
    """Decoder blocks of each part of a pipeline, at least one each; the tower is the first part's, the head the last's.

    The dearest part is as cheap as can be; of such splits it is one with even parts (least sum of squares).
    Raises ValueError for more parts than blocks.
    """
    blocks = cost.num_blocks
    if num_parts > blocks:
        raise ValueError(f"{num_parts} pipeline stages for {blocks} decoder blocks; use fewer stages")
    each, first, last = cost.block(work), cost.tile * work.tiles, cost.head * work.tokens
    # best[b]: the dearest part and the sum of squares of the parts so far when they hold b blocks; taken: blocks of the newest one.
    best = {0: (0.0, 0.0)}
    taken: list[dict[int, int]] = []
    for part in range(num_parts):
        extra = first * (part == 0) + last * (part == num_parts - 1)
        new, choice = {}, {}
        for total in range(part + 1, blocks - (num_parts - 1 - part) + 1):
            options = []
            for n in range(1, total + 1):
                if total - n in best:
                    (dearest, squares), own = best[total - n], n * each + extra
                    options.append(((max(dearest, own), squares + own**2), n))
            if options:
                new[total], choice[total] = min(options)
        best = new
        taken.append(choice)
    counts, left = list[int](), blocks
    for choice in reversed(taken):
        counts.insert(0, choice[left])
        left -= choice[left]
    ends = np.cumsum(counts)
    return [range(int(end) - n, int(end)) for end, n in zip(ends, counts, strict=True)]
