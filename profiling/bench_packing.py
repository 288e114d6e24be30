"""How full packs are, and how evenly their cost is spread over ranks, on a long-tailed set of documents.

Lengths of text are log-normal, 6 of 10 documents have an image of 1 to 17 tiles, and the cost is that of the 3B preset. Each method
chooses the packs of step after step from what waits, which is filled up from an endless stream; what it leaves waits for later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from smalt.model import PRESETS, ModelConfig
from smalt.model.cost import Workload, model_cost

from .tables import print_table

# (lengths, costs, packs, tokens of a pack) to the documents of each pack; (costs of packs, ranks) to the packs of each rank.
Choose = Callable[[np.ndarray, np.ndarray, int, int], list[list[int]]]
Deal = Callable[[np.ndarray, int], list[list[int]]]

# Of the text of a document, in tokens; of a document to have an image; of its number of tiles, thumbnail included.
MEDIAN, SIGMA, WITH_IMAGE = 600, 1.0, 0.6
TILES = {1: 0.40, 3: 0.15, 5: 0.15, 7: 0.10, 10: 0.10, 13: 0.05, 17: 0.05}
WINDOW = 256


@dataclass(frozen=True)
class Packed:
    """fill: share of the rows that are documents'; spread: cost of the rank that has most to do over the mean; means over steps.
    worst: the spread of the worst step."""

    fill: float
    spread: float
    worst: float


def long_tailed(seed: int, length: int, config: ModelConfig = PRESETS["bluelm_3b"]) -> Iterator[tuple[int, float]]:
    """An endless stream of documents of at most ``length`` tokens: (tokens, cost)."""
    rng, cost, per_tile = np.random.default_rng(seed), model_cost(config), config.vision.tokens_per_tile
    while True:
        tiles = int(rng.choice(list(TILES), p=list(TILES.values()))) if rng.random() < WITH_IMAGE else 0
        image = tiles * per_tile
        text = max(16, int(rng.lognormal(np.log(MEDIAN), SIGMA)))
        tokens = min(length, text + image)
        pairs = tokens * (tokens + 1) / 2 + image * (image - 1) / 2
        if tokens - image >= 16:
            yield tokens, cost(Workload(tokens, pairs, tiles))


def first_fit(lengths: np.ndarray, costs: np.ndarray, num_packs: int, capacity: int) -> list[list[int]]:
    """Greedy first fit: each document, oldest first, into the first pack that has room."""
    packs, free = [list[int]() for _ in range(num_packs)], np.full(num_packs, capacity)
    for document, tokens in enumerate(lengths):
        fitting = np.flatnonzero(free >= tokens)
        if len(fitting):
            packs[fitting[0]].append(document)
            free[fitting[0]] -= tokens
    return packs


def equal_tokens(lengths: np.ndarray, costs: np.ndarray, num_packs: int, capacity: int) -> list[list[int]]:
    """Equal token counts: each document, oldest first, into the pack that has fewest tokens."""
    packs, free = [list[int]() for _ in range(num_packs)], np.full(num_packs, capacity)
    for document, tokens in enumerate(lengths):
        emptiest = int(np.argmax(free))
        if free[emptiest] >= tokens:
            packs[emptiest].append(document)
            free[emptiest] -= tokens
    return packs


def simulate(
    choose: Choose,
    deal: Deal,
    documents: Iterator[tuple[int, float]],
    length: int,
    num_ranks: int,
    packs_a_rank: int,
    *,
    pool: int,
    steps: int,
) -> Packed:
    """``steps`` steps of one method. pool: steps' worth of tokens that wait."""
    waiting: list[tuple[int, float]] = []
    num_packs, fills, spreads = num_ranks * packs_a_rank, [], []
    for _ in range(steps):
        while sum(tokens for tokens, _ in waiting) < pool * num_packs * length:
            waiting += [next(documents) for _ in range(WINDOW)]
        lengths, costs = (np.array(column) for column in zip(*waiting, strict=True))
        packs = choose(lengths, costs, num_packs, length)
        of_packs = np.array([costs[pack].sum() for pack in packs])
        of_ranks = np.array([of_packs[numbers].sum() for numbers in deal(of_packs, num_ranks)])
        fills.append(sum(lengths[pack].sum() for pack in packs) / (num_packs * length))
        spreads.append(of_ranks.max() / of_ranks.mean())
        chosen = {document for pack in packs for document in pack}
        waiting = [document for i, document in enumerate(waiting) if i not in chosen]
    return Packed(float(np.mean(fills)), float(np.mean(spreads)), float(np.max(spreads)))


def in_order(costs: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Pack i goes to rank i modulo their number, whatever it costs."""
    return [list(range(rank, len(costs), num_ranks)) for rank in range(num_ranks)]


BASELINES: dict[str, tuple[Choose, Deal]] = {"first fit": (first_fit, in_order), "equal tokens": (equal_tokens, in_order)}
# Tokens of a pack, and packs of a rank in a step.
CASES = (4096, 4), (8192, 1), (32768, 1)


def bench_packing(methods: dict[str, tuple[Choose, Deal]], num_ranks: int, pool: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """Every method on the same documents, in every case."""
    return [
        {
            "length": length, "packs_a_rank": packs, "method": name,
            **asdict(simulate(choose, deal, long_tailed(seed, length), length, num_ranks, packs, pool=pool, steps=steps)),
        }
        for length, packs in CASES
        for name, (choose, deal) in methods.items()
    ]  # fmt: skip


def print_packing(rows: list[dict[str, Any]], num_ranks: int) -> None:
    table = Table(title=f"Packs of a step over {num_ranks} ranks")
    for column in ("tokens a pack", "packs a rank", "method", "fill", "max / mean cost", "worst step"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            f"{row['length']:,}",
            str(row["packs_a_rank"]),
            row["method"],
            f"{row['fill']:.1%}",
            f"{row['spread']:.3f}",
            f"{row['worst']:.3f}",
        )  # fmt: skip
    print_table(Console(highlight=False), table)
