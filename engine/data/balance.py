"""Which of the documents that wait make the packs of a step: packs that are full, and cost the same.

A rank that has more work than the others makes all of them wait. Equal tokens are not equal work: a row costs the keys that it sees,
and a tile costs the vision tower. So packs are chosen by :mod:`smalt.model.cost`, a few of them at a time:

1. The oldest documents fill the packs, dearest first, each into the cheapest pack that has room.
2. Gaps are filled by the longest that fits of all that wait.
3. Documents change places, between packs or with those that wait, as long as a pack comes nearer to the cost of the mean pack.
"""

from __future__ import annotations

import numpy as np

# Packs that are chosen together, and documents that wait and may take part, for each of them: the work grows with both.
GROUP, CANDIDATES = 16, 64
# A group is nearly full before its gaps are filled. Exchanges may leave so much of a pack empty.
BEFORE_GAPS, EMPTY = 0.97, 0.01
# Distance from the mean cost at which a pack is left as it is, and the share of it that an exchange must gain.
NEAR, GAIN = 0.005, 0.01
# Exchanges of a group, for each of its packs.
EXCHANGES = 8


def choose_packs(lengths: np.ndarray, costs: np.ndarray, num_packs: int, capacity: int) -> list[list[int]]:
    """Choose documents, by their index, for ``num_packs`` packs; each has one at least, and the rest waits.

    lengths: int64 [N] in tokens, none above ``capacity``, oldest first; costs: float64 [N]. There are at least as many documents as
    packs. The oldest document is always among the chosen; of each GROUP of packs a quarter as many as there are packs.
    """
    # The pool changes slowly, so that steps cost the same, too.
    mean = float(costs.sum() / lengths.sum()) * capacity * (1 - EMPTY / 2)
    waiting, packs = np.arange(len(lengths)), list[list[int]]()
    while len(packs) < num_packs:
        left = num_packs - len(packs)
        size = min(GROUP, left)
        most = len(waiting) - (left - size)  # one stays for each pack of the groups to come
        pool = waiting[: min(most, max(CANDIDATES * size, _enough(lengths[waiting], size, capacity)))]
        group = _Group(lengths[pool], costs[pool], size, capacity, mean)
        packs += [sorted(int(pool[i]) for i in pack) for pack in group.chosen()]
        waiting = np.setdiff1d(waiting, np.concatenate(packs[-size:]), assume_unique=True)
    return packs


def _enough(lengths: np.ndarray, num_packs: int, capacity: int) -> int:
    """How many of the oldest documents fill that many packs twice."""
    return int(np.searchsorted(np.cumsum(lengths), 2 * num_packs * capacity)) + num_packs


class _Group:
    """Packs that are chosen together. load, free: cost and empty tokens of each; waits: bool, by document."""

    def __init__(self, lengths: np.ndarray, costs: np.ndarray, num_packs: int, capacity: int, mean: float):
        self.lengths, self.costs, self.capacity, self.mean = lengths, costs, capacity, mean
        self.packs: list[list[int]] = [[] for _ in range(num_packs)]
        self.load, self.free = np.zeros(num_packs), np.full(num_packs, capacity)
        self.waits = np.ones(len(lengths), bool)
        # These stay: the oldest would otherwise be exchanged for ever. Few enough that each finds a pack of its own.
        self.oldest = max(1, num_packs // 4)

    def chosen(self) -> list[list[int]]:
        self._fill()
        self._fill_gaps()
        for _ in range(EXCHANGES * len(self.packs)):
            if not self._exchange():
                break
        return self.packs

    def _fill(self) -> None:
        num_packs = len(self.packs)
        nearly = int(np.searchsorted(np.cumsum(self.lengths), BEFORE_GAPS * num_packs * self.capacity, side="right"))
        rest = np.arange(self.oldest, max(nearly, num_packs))
        dearest_first = rest[np.argsort(-self.costs[rest], kind="stable")]
        for document in [*range(self.oldest), *map(int, dearest_first)]:
            for pack in np.argsort(self.load, kind="stable"):
                if self.lengths[document] <= self.free[pack]:
                    self._put(document, int(pack))
                    break

    def _fill_gaps(self) -> None:
        for pack in map(int, np.argsort(self.load, kind="stable")):
            while len(fitting := np.flatnonzero(self.waits & (self.lengths <= self.free[pack]))):
                self._put(int(fitting[np.argmax(self.lengths[fitting])]), pack)

    def _exchange(self) -> bool:
        """Make the best exchange of the pack that is farthest from the mean and has a good one; whether there was any."""
        distance = np.abs(self.load - self.mean)
        for pack in map(int, np.argsort(-distance, kind="stable")):
            if distance[pack] <= NEAR * self.mean:
                return False
            best, exchange = distance[pack] * (1 - GAIN), None
            for other in [None, *(o for o in range(len(self.packs)) if o != pack)]:
                gap, ours, theirs = self._best_with(pack, other)
                if gap < best:
                    best, exchange = gap, (other, ours, theirs)
            if exchange is not None:
                other, ours, theirs = exchange
                self._take(ours, pack)
                if other is not None:
                    self._take(theirs, other)
                    self._put(ours, other)
                self._put(theirs, pack)
                return True
        return False

    def _best_with(self, pack: int, other: int | None) -> tuple[float, int, int]:
        """The exchange of one document of a pack for one of another, or of those that wait, that leaves the farther of the two nearest
        to the mean: (its distance then, the document, the one that comes for it)."""
        ours = self._movable(pack)
        theirs = np.flatnonzero(self.waits) if other is None else self._movable(other)
        if not len(ours) or not len(theirs):
            return np.inf, -1, -1
        longer = self.lengths[theirs] - self.lengths[ours][:, None]
        dearer = self.costs[theirs] - self.costs[ours][:, None]
        allowed = self._stays_full(pack, self.free[pack] - longer)
        gap = np.abs(self.load[pack] + dearer - self.mean)
        if other is not None:
            allowed &= self._stays_full(other, self.free[other] + longer)
            gap = np.maximum(gap, np.abs(self.load[other] - dearer - self.mean))
        gap = np.where(allowed, gap, np.inf)
        i, j = np.unravel_index(np.argmin(gap), gap.shape)
        return float(gap[i, j]), int(ours[i]), int(theirs[j])

    def _stays_full(self, pack: int, free: np.ndarray) -> np.ndarray:
        return (free >= 0) & ((free <= self.free[pack]) | (free <= EMPTY * self.capacity))

    def _movable(self, pack: int) -> np.ndarray:
        return np.array([document for document in self.packs[pack] if document >= self.oldest], np.int64)

    def _put(self, document: int, pack: int) -> None:
        self.packs[pack].append(document)
        self._account(document, pack, +1)

    def _take(self, document: int, pack: int) -> None:
        self.packs[pack].remove(document)
        self._account(document, pack, -1)

    def _account(self, document: int, pack: int, sign: int) -> None:
        self.load[pack] += sign * self.costs[document]
        self.free[pack] -= sign * self.lengths[document]
        self.waits[document] = sign < 0


def deal_packs(costs: np.ndarray, num_replicas: int) -> list[list[int]]:
    """The packs of each replica, as many for each, so that what runs at the same time costs the same, and so does the sum.

    Dearest first, one to each replica, the dearest of them to the one that has least so far. Raises ValueError if they do not divide.
    """
    if len(costs) % num_replicas:
        raise ValueError(f"{len(costs)} packs do not divide over {num_replicas} replicas")
    sums, dealt = np.zeros(num_replicas), [list[int]() for _ in range(num_replicas)]
    for row in np.argsort(-np.asarray(costs, np.float64), kind="stable").reshape(-1, num_replicas):
        for replica, number in zip(np.argsort(sums, kind="stable"), row, strict=True):
            dealt[replica].append(int(number))
            sums[replica] += costs[number]
    return dealt
